# Remove a switch that bears the tag; adapters that are still on it are on none then. One that somebody gave an uplink
# since is left alone: hardware of the host would go with it.
param(
    [Parameter(Mandatory)] [string] $Id,
    [Parameter(Mandatory)] [string] $Tag
)
$ErrorActionPreference = 'Stop'
$switch = Get-VMSwitch -Id $Id
if (-not ([string]$switch.Notes).StartsWith($Tag, [System.StringComparison]::Ordinal)) { throw 'VmsnapNotOurs' }
if (([string]$switch.SwitchType) -eq 'External') { throw 'VmsnapHasUplink' }
Remove-VMSwitch -VMSwitch $switch -Force
