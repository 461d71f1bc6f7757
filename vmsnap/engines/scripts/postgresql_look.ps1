# What lies in a data directory: the lock file, the version, what pg_controldata says, and folders that are elsewhere.
# Changes nothing.
function Read-Small([string] $Name) {
    $path = Join-Path -Path $given.DataDirectory -ChildPath $Name
    if (-not (Test-Path -LiteralPath $path)) { return '' }
    # The server keeps its lock file open.
    $stream = [System.IO.File]::Open($path, 'Open', 'Read', 'ReadWrite, Delete')
    try { (New-Object System.IO.StreamReader $stream).ReadToEnd() } finally { $stream.Close() }
}
$env:LC_ALL = 'C'
$env:LC_MESSAGES = 'C'
$said = & (Join-Path -Path $given.Programs -ChildPath 'pg_controldata.exe') -D $given.DataDirectory | Out-String
$status = $LASTEXITCODE
$linked = @(foreach ($name in @('.', 'pg_tblspc')) {
    foreach ($item in @(Get-ChildItem -LiteralPath (Join-Path -Path $given.DataDirectory -ChildPath $name) -Directory -Force)) {
        if ($item.Attributes -band [System.IO.FileAttributes]::ReparsePoint) { [string]$item.FullName }
    }
})
$answer = @{
    Lock    = [string](Read-Small 'postmaster.pid')
    Version = [string](Read-Small 'PG_VERSION')
    Control = [string]$said
    Status  = [int]$status
    Linked  = $linked
}
ConvertTo-Json -Compress -Depth 3 -InputObject $answer
