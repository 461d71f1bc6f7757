# Give an environment a disk where its guest had one.
param(
    [Parameter(Mandatory)] [string] $Id,
    [Parameter(Mandatory)] [string] $Tag,
    [Parameter(Mandatory)] [ValidateSet('IDE', 'SCSI')] [string] $Controller,
    [Parameter(Mandatory)] [int] $Number,
    [Parameter(Mandatory)] [int] $Location,
    [Parameter(Mandatory)] [string] $Path,
    [Parameter(Mandatory)] [bool] $Boots
)
$ErrorActionPreference = 'Stop'
$vm = Get-VM -Id $Id
if (-not ([string]$vm.Notes).StartsWith($Tag, [System.StringComparison]::Ordinal)) { throw 'VmsnapNotOurs' }
while ($Controller -eq 'SCSI' -and @(Get-VMScsiController -VM $vm).Count -le $Number) { Add-VMScsiController -VM $vm }
Add-VMHardDiskDrive -VM $vm -ControllerType $Controller -ControllerNumber $Number -ControllerLocation $Location -Path $Path
if ($Boots -and $vm.Generation -ge 2) {
    $drive = Get-VMHardDiskDrive -VM $vm -ControllerType $Controller -ControllerNumber $Number -ControllerLocation $Location
    Set-VMFirmware -VM $vm -FirstBootDevice $drive
}
