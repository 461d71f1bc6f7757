# Put adapters of a clone or an environment on a switch. With SwitchTag: only on a private one that bears it.
param(
    [Parameter(Mandatory)] [string] $Id,
    [Parameter(Mandatory)] [string] $Tag,
    [Parameter(Mandatory)] [string] $SwitchId,
    [Parameter(Mandatory)] [AllowEmptyString()] [string] $SwitchTag,
    [Parameter(Mandatory)] [AllowEmptyCollection()] [string[]] $Macs
)
$ErrorActionPreference = 'Stop'
$vm = Get-VM -Id $Id
if (-not ([string]$vm.Notes).StartsWith($Tag, [System.StringComparison]::Ordinal)) { throw 'VmsnapNotOurs' }
$switch = Get-VMSwitch -Id $SwitchId
if ($SwitchTag) {
    if (([string]$switch.SwitchType) -ne 'Private') { throw 'VmsnapNotPrivate' }
    if (-not ([string]$switch.Notes).StartsWith($SwitchTag, [System.StringComparison]::Ordinal)) { throw 'VmsnapNotOurs' }
}
foreach ($adapter in @(Get-VMNetworkAdapter -VM $vm)) {
    if ($Macs -contains $adapter.MacAddress) { Connect-VMNetworkAdapter -VMNetworkAdapter $adapter -VMSwitch $switch }
}
