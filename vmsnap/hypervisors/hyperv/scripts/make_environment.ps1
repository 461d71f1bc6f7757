# Make a VM, off, on disks that are there, its adapters on no switch.
param(
    [Parameter(Mandatory)] [string] $Name,
    [Parameter(Mandatory)] [string] $Notes,
    [Parameter(Mandatory)] [string] $Folder,
    [Parameter(Mandatory)] [int] $Generation,
    [Parameter(Mandatory)] [long] $MemoryBytes,
    [Parameter(Mandatory)] [int] $Processors,
    [Parameter(Mandatory)] [bool] $SecureBoot,
    [Parameter(Mandatory)] [AllowEmptyString()] [string] $SecureBootTemplate
)
$ErrorActionPreference = 'Stop'
# Hyper-V allows two VMs of one name.
if (@(Get-VM | Where-Object { $_.Name -eq $Name }).Count -ne 0) { throw 'VmsnapMachineExists' }
$vm = New-VM -Name $Name -MemoryStartupBytes $MemoryBytes -Generation $Generation -Path $Folder -NoVHD
$settings = @{ Notes = $Notes; AutomaticStartAction = 'Nothing'; CheckpointType = 'Disabled' }
# Windows Server 2016 has no automatic checkpoints, and no such parameter.
if ((Get-Command -Name Set-VM).Parameters.ContainsKey('AutomaticCheckpointsEnabled')) { $settings.AutomaticCheckpointsEnabled = $false }
Set-VM -VM $vm @settings
Set-VMProcessor -VM $vm -Count $Processors
Get-VMNetworkAdapter -VM $vm | Remove-VMNetworkAdapter
if ($Generation -ge 2) {
    if (-not $SecureBoot) { Set-VMFirmware -VM $vm -EnableSecureBoot Off }
    elseif ($SecureBootTemplate) { Set-VMFirmware -VM $vm -EnableSecureBoot On -SecureBootTemplate $SecureBootTemplate }
}
[pscustomobject]@{ Id = [string]$vm.Id }
