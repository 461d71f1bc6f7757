# Every adapter of every VM, and of the host itself, with the switch it is on. Changes nothing.
param()
$ErrorActionPreference = 'Stop'
foreach ($adapter in @(Get-VMNetworkAdapter -All)) {
    [pscustomobject]@{
        MachineId = [string]$adapter.VMId
        Machine   = [string]$adapter.VMName
        OfHost    = [bool]$adapter.IsManagementOs
        Mac       = [string]$adapter.MacAddress
        SwitchId  = [string]$adapter.SwitchId
        Switch    = [string]$adapter.SwitchName
    }
}
