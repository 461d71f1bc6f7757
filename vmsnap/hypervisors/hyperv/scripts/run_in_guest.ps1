# Run a program in a guest of this host by PowerShell Direct, as the account of the credential. Output comes back as bytes.
param(
    [Parameter(Mandatory)] [string] $Id,
    [Parameter(Mandatory)] [pscredential] $Credential,
    [Parameter(Mandatory)] [string] $Program,
    [Parameter(Mandatory)] [AllowEmptyString()] [string] $Arguments,
    [Parameter(Mandatory)] [AllowEmptyString()] [string] $InputBase64,
    [Parameter(Mandatory)] [int] $OutputBytes,
    [Parameter(Mandatory)] [int] $TimeoutMs
)
$ErrorActionPreference = 'Stop'
$result = Invoke-Command -VMId $Id -Credential $Credential -ArgumentList $Program, $Arguments, $InputBase64, $OutputBytes, $TimeoutMs -ScriptBlock {
    param($Program, $Arguments, $InputBase64, $OutputBytes, $TimeoutMs)
    $ErrorActionPreference = 'Stop'
    $answer = @{ Outcome = 'ended'; Code = 0; Words = ''; Output = ''; Error = ''; Truncated = $false }
    $start = New-Object -TypeName System.Diagnostics.ProcessStartInfo
    $start.FileName = $Program
    $start.Arguments = $Arguments
    $start.WorkingDirectory = "$env:SystemDrive\"
    $start.UseShellExecute = $false
    $start.CreateNoWindow = $true
    $start.RedirectStandardInput = $true
    $start.RedirectStandardOutput = $true
    $start.RedirectStandardError = $true
    $process = New-Object -TypeName System.Diagnostics.Process
    $process.StartInfo = $start
    try { $null = $process.Start() }
    catch [System.ComponentModel.Win32Exception] {
        $answer.Outcome = 'not started'
        $answer.Code = $_.Exception.NativeErrorCode
        $answer.Words = $_.Exception.Message
        return $answer
    }
    $output = New-Object -TypeName System.IO.MemoryStream
    $words = New-Object -TypeName System.IO.MemoryStream
    $copies = @($process.StandardOutput.BaseStream.CopyToAsync($output), $process.StandardError.BaseStream.CopyToAsync($words))
    $given = [System.Convert]::FromBase64String($InputBase64)
    $writing = $process.StandardInput.BaseStream.WriteAsync($given, 0, $given.Length)
    $clock = [System.Diagnostics.Stopwatch]::StartNew()
    # A program need not read what it is given.
    while (-not $writing.IsCompleted -and -not $process.HasExited -and $clock.ElapsedMilliseconds -lt $TimeoutMs) { Start-Sleep -Milliseconds 5 }
    try { $process.StandardInput.Close() } catch [System.IO.IOException] { $answer.Words = $_.Exception.Message }
    $left = [Math]::Max(0, $TimeoutMs - $clock.ElapsedMilliseconds)
    if (-not $process.WaitForExit([int]$left)) {
        $answer.Outcome = 'late'
        $process.Kill()
        return $answer
    }
    # What it started may hold its streams open.
    $null = [System.Threading.Tasks.Task]::WaitAll($copies, 5000)
    $answer.Code = $process.ExitCode
    foreach ($pair in @(@('Output', $output), @('Error', $words))) {
        $length = [int][Math]::Min($pair[1].Length, $OutputBytes)
        $answer[$pair[0]] = [System.Convert]::ToBase64String($pair[1].GetBuffer(), 0, $length)
        if ($pair[1].Length -gt $OutputBytes) { $answer.Truncated = $true }
    }
    return $answer
}
[pscustomobject]@{
    Outcome   = [string]$result.Outcome
    Code      = [int]$result.Code
    Words     = [string]$result.Words
    Output    = [string]$result.Output
    Error     = [string]$result.Error
    Truncated = [bool]$result.Truncated
}
