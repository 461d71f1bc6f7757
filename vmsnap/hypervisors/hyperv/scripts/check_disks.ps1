# Look whether virtual disks are sound and stand on no other. Changes nothing.
param([Parameter(Mandatory)] [string[]] $Paths)
$ErrorActionPreference = 'Stop'
foreach ($path in $Paths) {
    $sound = [bool](Test-VHD -Path $path)
    $vhd = Get-VHD -Path $path
    [pscustomobject]@{
        Path      = $path
        Sound     = $sound
        Format    = [string]$vhd.VhdFormat
        Parent    = [string]$vhd.ParentPath
        SizeBytes = [long]$vhd.Size
    }
}
