# Make a clone of an export, saved or off, with no adapter connected. A bare Import-VM would put it on the switches of the
# original: so it is taken apart while it is only planned, and looked at once more before it is made.
param(
    [Parameter(Mandatory)] [string] $Configuration,
    [Parameter(Mandatory)] [string] $Folder,
    [Parameter(Mandatory)] [string] $Disks,
    [Parameter(Mandatory)] [string] $Name,
    [Parameter(Mandatory)] [string] $Notes
)
$ErrorActionPreference = 'Stop'
$paths = @{
    VirtualMachinePath  = $Folder
    SnapshotFilePath    = $Folder
    SmartPagingFilePath = $Folder
    VhdDestinationPath  = $Disks
}
$report = Compare-VM -Path $Configuration -Copy -GenerateNewId @paths
Get-VMNetworkAdapter -VM $report.VM | Disconnect-VMNetworkAdapter
$settings = @{ NewVMName = $Name; Notes = $Notes; AutomaticStartAction = 'Nothing'; CheckpointType = 'Disabled' }
# Windows Server 2016 has no automatic checkpoints, and no such parameter.
if ((Get-Command -Name Set-VM).Parameters.ContainsKey('AutomaticCheckpointsEnabled')) { $settings.AutomaticCheckpointsEnabled = $false }
Set-VM -VM $report.VM @settings
$report = Compare-VM -CompatibilityReport $report
if (@($report.Incompatibilities).Count -ne 0) {
    foreach ($incompatibility in $report.Incompatibilities) {
        [pscustomobject]@{
            Kind    = 'incompatibility'
            Number  = [int]$incompatibility.MessageId
            Message = [string]$incompatibility.Message
        }
    }
    return
}
foreach ($adapter in @(Get-VMNetworkAdapter -VM $report.VM)) {
    if ($adapter.SwitchName -or $adapter.Connected) { throw 'VmsnapStillConnected' }
}
$vm = Import-VM -CompatibilityReport $report
[pscustomobject]@{
    Kind  = 'machine'
    Id    = [string]$vm.Id
    State = [string]$vm.State
}
