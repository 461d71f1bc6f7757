# Memory of the host, and room in the folder of exports. Changes nothing.
param([Parameter(Mandatory)] [string] $Folder)
$ErrorActionPreference = 'Stop'
$system = Get-CimInstance -ClassName Win32_OperatingSystem
$volume = Get-Volume -FilePath $Folder
[pscustomobject]@{
    Computer        = [string]$system.CSName
    FreeMemoryBytes = [long]$system.FreePhysicalMemory * 1024
    FreeBytes       = [long]$volume.SizeRemaining
    FileSystem      = [string]$volume.FileSystemType
}
