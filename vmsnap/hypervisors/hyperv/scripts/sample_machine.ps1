# What a VM does at this moment, for measuring how long it stands still. Changes nothing.
param([Parameter(Mandatory)] [string] $Id)
$ErrorActionPreference = 'Stop'
$vm = Get-VM -Id $Id
[pscustomobject]@{
    State    = [string]$vm.State
    UptimeMs = [double]$vm.Uptime.TotalMilliseconds
}
