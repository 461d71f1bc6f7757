# Remove a private switch that bears the tag. Adapters that are still on it are on none then.
param(
    [Parameter(Mandatory)] [string] $Id,
    [Parameter(Mandatory)] [string] $Tag
)
$ErrorActionPreference = 'Stop'
$switch = Get-VMSwitch -Id $Id
if (-not ([string]$switch.Notes).StartsWith($Tag, [System.StringComparison]::Ordinal)) { throw 'VmsnapNotOurs' }
if (([string]$switch.SwitchType) -ne 'Private') { throw 'VmsnapNotPrivate' }
Remove-VMSwitch -VMSwitch $switch -Force
