# What a host must be for vmsnap, and what nobody could know of it beforehand. Changes nothing.
param(
    [Parameter(Mandatory)] [string] $Folder,
    [Parameter(Mandatory)] [string[]] $Needed
)
$ErrorActionPreference = 'Stop'
$settings = @{}
foreach ($path in @('Service\AllowUnencrypted', 'Service\Auth\Basic', 'Shell\MaxMemoryPerShellMB', 'Shell\MaxShellsPerUser')) {
    # Only administrators may read these.
    try { $settings[$path] = [string](Get-Item -LiteralPath "WSMan:\localhost\$path").Value } catch { $settings[$path] = '' }
}
$missing = @(foreach ($need in $Needed) {
    $name, $parameter = $need -split ' '
    $command = Get-Command -Name $name -ErrorAction SilentlyContinue
    if (-not $command -or ($parameter -and -not $command.Parameters.ContainsKey($parameter))) { $need }
})
$classes = @(foreach ($class in @('Msvm_ShutdownComponent', 'Msvm_PlannedComputerSystem', 'Msvm_VirtualSystemManagementService')) {
    if (-not (Get-CimClass -Namespace root/virtualization/v2 -ClassName $class -ErrorAction SilentlyContinue)) { $class }
})
$system = Get-CimInstance -ClassName Win32_OperatingSystem
$there = Test-Path -LiteralPath $Folder -PathType Container
$volume = if ($there) { Get-Volume -FilePath $Folder -ErrorAction SilentlyContinue }
$names = if ($there) { @(Get-ChildItem -LiteralPath $Folder -Directory | ForEach-Object { $_.Name }) } else { @() }
[pscustomobject]@{
    Computer          = [string]$system.CSName
    Version           = [string]$system.Version
    PowerShell        = [string]$PSVersionTable.PSVersion
    Language          = [int]$system.OSLanguage
    UtcNow            = [System.DateTime]::UtcNow.ToString('yyyy-MM-ddTHH:mm:ssZ')
    Groups            = [string](@([System.Security.Principal.WindowsIdentity]::GetCurrent().Groups | ForEach-Object { $_.Value }) -join ' ')
    Missing           = [string]($missing -join ', ')
    MissingClasses    = [string]($classes -join ', ')
    Management        = [string](Get-Service -Name vmms -ErrorAction SilentlyContinue).Status
    Cluster           = [string](Get-Service -Name ClusSvc -ErrorAction SilentlyContinue).Status
    FolderThere       = [bool]$there
    FileSystem        = [string]$volume.FileSystemType
    Folders           = [string](@($names | Where-Object { $_ -match '^[A-Za-z0-9._-]+$' }) -join ' ')
    AllowUnencrypted  = [string]$settings['Service\AllowUnencrypted']
    Basic             = [string]$settings['Service\Auth\Basic']
    ShellMegabytes    = [string]$settings['Shell\MaxMemoryPerShellMB']
    ShellsPerUser     = [string]$settings['Shell\MaxShellsPerUser']
}
