# Give an environment a network adapter with a MAC of its own, on no switch.
param(
    [Parameter(Mandatory)] [string] $Id,
    [Parameter(Mandatory)] [string] $Tag,
    [Parameter(Mandatory)] [string] $Name,
    [Parameter(Mandatory)] [string] $Mac
)
$ErrorActionPreference = 'Stop'
$vm = Get-VM -Id $Id
if (-not ([string]$vm.Notes).StartsWith($Tag, [System.StringComparison]::Ordinal)) { throw 'VmsnapNotOurs' }
Add-VMNetworkAdapter -VM $vm -Name $Name -StaticMacAddress $Mac
