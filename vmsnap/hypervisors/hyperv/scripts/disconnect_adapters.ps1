# Pull the cables of a clone or an environment: of the adapters with these MACs, or of all.
param(
    [Parameter(Mandatory)] [string] $Id,
    [Parameter(Mandatory)] [string] $Tag,
    [Parameter(Mandatory)] [AllowEmptyCollection()] [string[]] $Macs
)
$ErrorActionPreference = 'Stop'
$vm = Get-VM -Id $Id
if (-not ([string]$vm.Notes).StartsWith($Tag, [System.StringComparison]::Ordinal)) { throw 'VmsnapNotOurs' }
foreach ($adapter in @(Get-VMNetworkAdapter -VM $vm)) {
    if ($Macs.Count -eq 0 -or $Macs -contains $adapter.MacAddress) { Disconnect-VMNetworkAdapter -VMNetworkAdapter $adapter }
}
