# Machines that were planned and never made, as an import that was cut off leaves them. Changes nothing.
param()
$ErrorActionPreference = 'Stop'
foreach ($planned in @(Get-CimInstance -Namespace root/virtualization/v2 -ClassName Msvm_PlannedComputerSystem)) {
    $settings = @(Get-CimAssociatedInstance -InputObject $planned -ResultClassName Msvm_VirtualSystemSettingData)
    [pscustomobject]@{
        Id     = [string]$planned.Name
        Name   = [string]$planned.ElementName
        Folder = [string]($settings | Select-Object -First 1).ConfigurationDataRoot
    }
}
