# One VM with its disks, adapters and integration services, one object each; Kind says which. Changes nothing.
param([Parameter(Mandatory)] [string] $Id)
$ErrorActionPreference = 'Stop'
$vm = Get-VM -Id $Id
$machine = [ordered]@{
    Kind               = 'machine'
    Id                 = [string]$vm.Id
    Name               = [string]$vm.Name
    State              = [string]$vm.State
    Notes              = [string]$vm.Notes
    Generation         = [int]$vm.Generation
    MemoryBytes        = [long]$vm.MemoryStartup
    AssignedBytes      = [long]$vm.MemoryAssigned
    DynamicMemory      = [bool]$vm.DynamicMemoryEnabled
    Processors         = [int]$vm.ProcessorCount
    Clustered          = [bool]$vm.IsClustered
    ReplicationState   = [string]$vm.ReplicationState
    Folder             = [string]$vm.Path
    Checkpoints        = @(Get-VMSnapshot -VM $vm).Count
    AssignedDevices    = @(Get-VMAssignableDevice -VM $vm).Count
    FibreChannel       = @(Get-VMFibreChannelHba -VM $vm).Count
    SecureBoot         = $false
    SecureBootTemplate = ''
    Tpm                = $false
    Shielded           = $false
    ProductType        = 0
}
# What Windows tells of itself by the integration service for data exchange: 1 a workstation, 2 a domain controller, 3 a server.
$exchange = @(Get-CimInstance -Namespace root/virtualization/v2 -ClassName Msvm_KvpExchangeComponent | Where-Object { $_.SystemName -eq $Id })
foreach ($text in @($exchange | ForEach-Object { $_.GuestIntrinsicExchangeItems })) {
    $item = [xml]$text
    if ($item.SelectSingleNode("/INSTANCE/PROPERTY[@NAME='Name']/VALUE").InnerText -eq 'ProductType') {
        $machine.ProductType = [int]$item.SelectSingleNode("/INSTANCE/PROPERTY[@NAME='Data']/VALUE").InnerText
    }
}
if ($vm.Generation -ge 2) {
    $firmware = Get-VMFirmware -VM $vm
    $machine.SecureBoot = ([string]$firmware.SecureBoot) -eq 'On'
    $machine.SecureBootTemplate = [string]$firmware.SecureBootTemplate
    $security = Get-VMSecurity -VM $vm
    $machine.Tpm = [bool]$security.TpmEnabled
    $machine.Shielded = [bool]$security.Shielded
}
[pscustomobject]$machine
foreach ($drive in @(Get-VMHardDiskDrive -VM $vm)) {
    $disk = [ordered]@{
        Kind       = 'disk'
        Controller = [string]$drive.ControllerType
        Number     = [int]$drive.ControllerNumber
        Location   = [int]$drive.ControllerLocation
        Path       = [string]$drive.Path
        Physical   = $null -ne $drive.DiskNumber
        Shared     = [bool]$drive.SupportPersistentReservations
        Format     = ''
        Type       = ''
        Parent     = ''
        SizeBytes  = [long]0
        FileBytes  = [long]0
    }
    if (-not $disk.Physical -and $disk.Path) {
        $vhd = Get-VHD -Path $drive.Path
        $disk.Format = [string]$vhd.VhdFormat
        $disk.Type = [string]$vhd.VhdType
        $disk.Parent = [string]$vhd.ParentPath
        $disk.SizeBytes = [long]$vhd.Size
        $disk.FileBytes = [long]$vhd.FileSize
    }
    [pscustomobject]$disk
}
foreach ($adapter in @(Get-VMNetworkAdapter -VM $vm)) {
    [pscustomobject]@{
        Kind      = 'adapter'
        Name      = [string]$adapter.Name
        Mac       = [string]$adapter.MacAddress
        Dynamic   = [bool]$adapter.DynamicMacAddressEnabled
        Switch    = [string]$adapter.SwitchName
        SwitchId  = [string]$adapter.SwitchId
        Legacy    = [bool]$adapter.IsLegacy
        IovWeight = [int]$adapter.IovWeight
        Addresses = [string](@($adapter.IPAddresses) -join ' ')
    }
}
foreach ($service in @(Get-VMIntegrationService -VM $vm)) {
    # Names of services are localised; the last part of their ids is not.
    [pscustomobject]@{
        Kind    = 'service'
        Service = ([string]$service.Id).Split('\')[-1].ToUpperInvariant()
        Enabled = [bool]$service.Enabled
        Status  = [string]$service.PrimaryOperationalStatus
    }
}
