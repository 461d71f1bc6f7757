# Let a clone or an environment run. Refuses any VM without the tag.
param(
    [Parameter(Mandatory)] [string] $Id,
    [Parameter(Mandatory)] [string] $Tag
)
$ErrorActionPreference = 'Stop'
$vm = Get-VM -Id $Id
if (-not ([string]$vm.Notes).StartsWith($Tag, [System.StringComparison]::Ordinal)) { throw 'VmsnapNotOurs' }
$null = Start-VM -VM $vm
