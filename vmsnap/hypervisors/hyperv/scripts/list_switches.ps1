# Every switch of this host. Changes nothing.
param()
$ErrorActionPreference = 'Stop'
foreach ($switch in @(Get-VMSwitch)) {
    [pscustomobject]@{
        Id           = [string]$switch.Id
        Name         = [string]$switch.Name
        Type         = [string]$switch.SwitchType
        Notes        = [string]$switch.Notes
        Uplinks      = [string](@($switch.NetAdapterInterfaceDescriptions) -join ' ')
        WithHost     = [bool]$switch.AllowManagementOS
    }
}
