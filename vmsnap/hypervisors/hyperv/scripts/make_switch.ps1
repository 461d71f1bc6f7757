# Make a private switch: it has no uplink, and the host itself is not on it.
param(
    [Parameter(Mandatory)] [string] $Name,
    [Parameter(Mandatory)] [string] $Notes
)
$ErrorActionPreference = 'Stop'
# Hyper-V allows two switches of one name.
if (@(Get-VMSwitch | Where-Object { $_.Name -eq $Name }).Count -ne 0) { throw 'VmsnapSwitchExists' }
$null = New-VMSwitch -Name $Name -SwitchType Private -Notes $Notes
