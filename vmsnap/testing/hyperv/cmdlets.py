"""The cmdlets that scripts of vmsnap may call, and their parameters: a script that names another one is refused.

The names of the Hyper-V module are those of its version 2.0 (Windows Server 2016 and later) as Microsoft documents them;
parameters that go to another host (``ComputerName``, ``CimSession``, ``Credential`` of the Hyper-V module) are left out on
purpose. PowerShell compares names without regard to case, and so does this.
"""

from __future__ import annotations

from collections.abc import Iterable

_HYPER_V = """
Get-VM: Name Id ClusterObject
Get-VMHost:
Get-VMIntegrationService: VM VMSnapshot VMName Name
Enable-VMIntegrationService: VMIntegrationService Name VM VMName Passthru
Get-VMNetworkAdapter: IsLegacy VM VMName Name All ManagementOS VMSnapshot SwitchName
Add-VMNetworkAdapter: VMName ManagementOS SwitchName IsLegacy Name DynamicMacAddress NumaAwarePlacement
    StaticMacAddress Passthru ResourcePoolName VM DeviceNaming
Remove-VMNetworkAdapter: VMNetworkAdapter ManagementOS VMName VM Name SwitchName Passthru
Set-VMNetworkAdapter: ManagementOS VMName VMNetworkAdapter VM Name DynamicMacAddress MediaType NumaAwarePlacement
    InterruptModeration StaticMacAddress MacAddressSpoofing DhcpGuard RouterGuard PortMirroring IeeePriorityTag
    VmqWeight IovQueuePairsRequested IovInterruptModeration IovWeight IPsecOffloadMaximumSecurityAssociation
    MaximumBandwidth MinimumBandwidthAbsolute MinimumBandwidthWeight MandatoryFeatureId ResourcePoolName
    TestReplicaPoolName TestReplicaSwitchName VirtualSubnetId AllowTeaming NotMonitoredInCluster StormLimit
    DynamicIPAddressLimit DeviceNaming FixSpeed10G PacketDirectNumProcs PacketDirectModerationCount
    PacketDirectModerationInterval VrssEnabled VmmqEnabled VrssMaxQueuePairs VrssMinQueuePairs
    VrssQueueSchedulingMode VrssExcludePrimaryProcessor VrssIndependentHostSpreading VrssVmbusChannelAffinityPolicy
    Passthru
Rename-VMNetworkAdapter: VMNetworkAdapter ManagementOS VM VMName Name NewName Passthru
Connect-VMNetworkAdapter: VMNetworkAdapter Name SwitchName VMSwitch UseAutomaticConnection Passthru VMName
Disconnect-VMNetworkAdapter: VMNetworkAdapter VMName Name Passthru
Get-VMNetworkAdapterVlan: VMSnapshot VMName VMNetworkAdapter ManagementOS VMNetworkAdapterName VM
Set-VMNetworkAdapterVlan: VMNetworkAdapter ManagementOS VMNetworkAdapterName VMName VM Untagged Access VlanId Trunk
    NativeVlanId AllowedVlanIdList Isolated Community Promiscuous PrimaryVlanId SecondaryVlanId SecondaryVlanIdList
    Passthru
Get-VHD: DiskNumber Path VMId
Test-VHD: Path SupportPersistentReservations
New-VHD: Path ParentPath SizeBytes SourceDisk Dynamic Fixed Differencing BlockSizeBytes LogicalSectorSizeBytes
    PhysicalSectorSizeBytes AddressAbstractionType DataAlignmentBytes AsJob
Convert-VHD: Path DestinationPath VHDType ParentPath BlockSizeBytes DeleteSource AsJob Passthru
    AddressAbstractionType
Resize-VHD: Path SizeBytes ToMinimumSize AsJob Passthru
Optimize-VHD: Path Mode AsJob Passthru
Mount-VHD: Path NoDriveLetter ReadOnly SnapshotId Passthru
Dismount-VHD: DiskNumber Path SnapshotId Passthru
Set-VHD: Path ParentPath LeafPath PhysicalSectorSizeBytes ResetDiskIdentifier Force IgnoreIdMismatch Passthru
Merge-VHD: Path DestinationPath Force AsJob Passthru
New-VMSwitch: Name Id SwitchType AllowManagementOS NetAdapterName NetAdapterInterfaceDescription Notes
    MinimumBandwidthMode EnableIov EnablePacketDirect EnableEmbeddedTeaming
Remove-VMSwitch: Name VMSwitch ResourcePoolName Force
Get-VMSwitch: Id Name ResourcePoolName SwitchType
Set-VMSwitch: VMSwitch Name NetAdapterName NetAdapterInterfaceDescription SwitchType AllowManagementOS
    DefaultFlowMinimumBandwidthAbsolute DefaultFlowMinimumBandwidthWeight DefaultQueueVrssEnabled
    DefaultQueueVmmqEnabled DefaultQueueVrssMaxQueuePairs DefaultQueueVrssMinQueuePairs
    DefaultQueueVrssQueueSchedulingMode DefaultQueueVrssExcludePrimaryProcessor EnableSoftwareRsc Extensions Notes
    Passthru
Export-VM: VM Name Path AsJob Passthru CaptureLiveState
Compare-VM: VirtualMachinePath SnapshotFilePath SmartPagingFilePath CompatibilityReport AsJob Name VM
    DestinationCimSession DestinationHost DestinationCredential IncludeStorage DestinationStoragePath Vhds
    ResourcePoolName RetainVhdCopiesOnSource Path VhdDestinationPath Register Copy VhdSourcePath GenerateNewId
Import-VM: CompatibilityReport Path VhdDestinationPath Register Copy VirtualMachinePath SnapshotFilePath
    SmartPagingFilePath VhdSourcePath GenerateNewId AsJob
Set-VM: VM Name GuestControlledCacheTypes LowMemoryMappedIoSpace HighMemoryMappedIoSpace BatteryPassthroughEnabled
    ProcessorCount DynamicMemory StaticMemory MemoryMinimumBytes MemoryMaximumBytes MemoryStartupBytes
    AutomaticStartAction AutomaticStopAction AutomaticStartDelay AutomaticCriticalErrorAction
    AutomaticCriticalErrorActionTimeout AutomaticCheckpointsEnabled LockOnDisconnect Notes NewVMName
    SnapshotFileLocation SmartPagingFilePath CheckpointType EnhancedSessionTransportType Passthru
    AllowUnverifiedPaths
Rename-VM: VM Name NewName Passthru
Start-VM: VM Name AsJob Passthru
Stop-VM: VM Name Save TurnOff Force AsJob Passthru
Save-VM: VM Name AsJob Passthru
Suspend-VM: VM Name AsJob Passthru
Resume-VM: VM Name AsJob Passthru
Restart-VM: VM Name Force AsJob Passthru Wait For Delay Timeout Type
Remove-VM: Name VM Force AsJob Passthru
New-VM: Name MemoryStartupBytes BootDevice NoVHD SwitchName NewVHDPath NewVHDSizeBytes VHDPath Path Version
    Prerelease Experimental Generation Force AsJob
Checkpoint-VM: VM Name SnapshotName AsJob Passthru
Get-VMSnapshot: VMName VM Id Name ChildOf ParentOf SnapshotType
Remove-VMSnapshot: VM VMName VMSnapshot Name IncludeAllChildSnapshots AsJob Passthru
Export-VMSnapshot: VM VMSnapshot Name Path VMName AsJob Passthru
Add-VMHardDiskDrive: VMName VM VMDriveController ControllerType ControllerNumber ControllerLocation Path DiskNumber
    ResourcePoolName SupportPersistentReservations AllowUnverifiedPaths MaximumIOPS MinimumIOPS QoSPolicyID
    QoSPolicy Passthru OverrideCacheAttributes
Get-VMHardDiskDrive: VMName VM VMSnapshot ControllerLocation VMDriveController ControllerNumber ControllerType
Set-VMHardDiskDrive: VMHardDiskDrive VMName ControllerType ControllerNumber ControllerLocation Path ToControllerType
    ToControllerNumber ToControllerLocation DiskNumber ResourcePoolName SupportPersistentReservations
    AllowUnverifiedPaths MaximumIOPS MinimumIOPS QoSPolicyID QoSPolicy Passthru OverrideCacheAttributes
Remove-VMHardDiskDrive: VMName VMHardDiskDrive ControllerType ControllerNumber ControllerLocation Passthru
Get-VMDvdDrive: VMName VM ControllerLocation ControllerNumber VMDriveController VMSnapshot
Remove-VMDvdDrive: VMName VMDvdDrive ControllerNumber ControllerLocation Passthru
Get-VMFirmware: VM VMSnapshot VMName
Set-VMFirmware: VMName VM VMFirmware BootOrder FirstBootDevice EnableSecureBoot SecureBootTemplate
    SecureBootTemplateId PreferredNetworkBootProtocol ConsoleMode PauseAfterBootFailure Passthru
Get-VMBios: VM VMSnapshot VMName
Set-VMBios: VMName VM VMBios DisableNumLock EnableNumLock StartupOrder Passthru
Get-VMProcessor: VMSnapshot VMName VM
Set-VMProcessor: VMName VM VMProcessor Count CompatibilityForMigrationEnabled
    CompatibilityForOlderOperatingSystemsEnabled HwThreadCountPerCore Maximum Reserve RelativeWeight
    MaximumCountPerNumaNode MaximumCountPerNumaSocket ResourcePoolName EnableHostResourceProtection
    ExposeVirtualizationExtensions Perfmon EnableLegacyApicMode AllowACountMCount Passthru
Get-VMMemory: VM VMSnapshot VMName
Set-VMMemory: VMName VM VMMemory Buffer DynamicMemoryEnabled MaximumBytes StartupBytes MinimumBytes Priority
    MaximumAmountPerNumaNodeBytes ResourcePoolName Passthru
Measure-VM: Name VM
Get-VMReplication: VMName VM ReplicaServerName PrimaryServerName ReplicationState ReplicationHealth ReplicationMode
    ReplicationRelationshipType TrustGroup
Get-VMSecurity: VMName VM
Get-VMKeyProtector: VM VMName
Get-VMFibreChannelHba: VM VMName
Get-VMAssignableDevice: VMName VM
Get-VMGpuPartitionAdapter: VMSnapshot VMName VM AdapterId
Get-VMScsiController: VMSnapshot VMName ControllerNumber VM
Get-VMIdeController: VM VMSnapshot VMName ControllerNumber
Remove-VMSavedState: VM VMName VMSnapshot
Get-VMHostSupportedVersion: Default
Add-VMScsiController: VM VMName Passthru
Get-VMComPort: VM VMName VMSnapshot Number
Get-VMStoragePath: Path ResourcePoolName ResourcePoolType
Get-VMGroup: Name Id
Wait-VM: VM Name AsJob Passthru For Delay Timeout
"""

_OTHERS = """
Get-CimInstance: ClassName InputObject Namespace Filter Property KeyOnly Query QueryDialect OperationTimeoutSec
    ResourceUri Shallow
Get-CimClass: ClassName Namespace MethodName PropertyName QualifierName OperationTimeoutSec Amended
Get-CimAssociatedInstance: InputObject ResultClassName Association Namespace OperationTimeoutSec KeyOnly ResourceUri
Invoke-CimMethod: ClassName InputObject MethodName Arguments Namespace Query QueryDialect OperationTimeoutSec
    ResourceUri CimClass
Get-ClusterGroup: Name VMId InputObject Cluster
Get-SmbShare: Name ScopeName Scoped Special ContinuouslyAvailable ShareState FolderEnumerationMode CachingMode
    ConcurrentUserLimit AvailabilityType CaTimeout EncryptData IncludeHidden SmbInstance ThrottleLimit AsJob
Get-SmbShareAccess: Name ScopeName SmbInstance InputObject ThrottleLimit AsJob
Get-Volume: DriveLetter ObjectId UniqueId Path FileSystemLabel FilePath Partition StoragePool ThrottleLimit AsJob
New-Item: Path Name ItemType Value Force Credential
Remove-Item: Path LiteralPath Filter Include Exclude Recurse Force Credential Stream
Test-Path: Path LiteralPath Filter Include Exclude PathType IsValid Credential OlderThan NewerThan
Get-Item: Path LiteralPath Filter Include Exclude Force Credential Stream
Get-ChildItem: Path LiteralPath Filter Include Exclude Recurse Depth Force Name Attributes Directory File Hidden
    ReadOnly System
Get-Content: Path LiteralPath ReadCount TotalCount Tail Filter Include Exclude Force Credential Delimiter Wait Raw
    Encoding Stream
Set-Content: Path LiteralPath Value PassThru Filter Include Exclude Force Credential NoNewline Encoding Stream
Copy-Item: Path LiteralPath Destination Container Force Filter Include Exclude Recurse PassThru Credential
    FromSession ToSession
Move-Item: Path LiteralPath Destination Force Filter Include Exclude PassThru Credential
Invoke-Command: VMId VMName Credential ScriptBlock ArgumentList InputObject FilePath ConfigurationName AsJob
    HideComputerName ThrottleLimit Session
New-PSSession: VMId VMName Credential ConfigurationName Name
Remove-PSSession: Session Id InstanceId Name
Get-Module: Name FullyQualifiedName All ListAvailable PSEdition Refresh PSSession
Import-Module: Name Force Global Scope PassThru RequiredVersion MinimumVersion MaximumVersion DisableNameChecking
Get-Command: Name Verb Noun Module CommandType All ListImported ParameterName ParameterType Syntax TotalCount
    ArgumentList
Get-Service: Name DisplayName DependentServices RequiredServices Include Exclude InputObject
Get-WindowsFeature: Name Vhd LogPath
Get-Date: Date Format UFormat Year Month Day Hour Minute Second Millisecond DisplayHint
Join-Path: Path ChildPath Resolve Credential
Split-Path: Path LiteralPath Parent Leaf Qualifier NoQualifier Resolve IsAbsolute Credential
Where-Object: InputObject FilterScript Property Value EQ NE GT GE LT LE Like NotLike Match NotMatch Contains
    NotContains In NotIn Is IsNot
ForEach-Object: InputObject Begin Process End RemainingScripts MemberName ArgumentList
Select-Object: InputObject Property ExcludeProperty ExpandProperty Unique Last First Skip SkipLast Wait Index
Sort-Object: InputObject Property Descending Unique CaseSensitive Culture
Measure-Object: InputObject Property Sum Average Maximum Minimum Line Word Character IgnoreWhiteSpace
Group-Object: InputObject Property NoElement AsHashTable AsString CaseSensitive Culture
ConvertTo-Json: InputObject Depth Compress
ConvertFrom-Json: InputObject
New-Object: TypeName ArgumentList ComObject Strict Property
Add-Type: TypeDefinition AssemblyName Path LiteralPath Name MemberDefinition Namespace PassThru Language
Add-Member: InputObject MemberType Name Value SecondValue TypeName Force PassThru NotePropertyName NotePropertyValue
Out-Null: InputObject
Out-String: InputObject Stream Width
Write-Output: InputObject NoEnumerate
Write-Error: Message Exception ErrorRecord Category ErrorId TargetObject RecommendedAction CategoryActivity
    CategoryReason CategoryTargetName CategoryTargetType
Write-Warning: Message
Start-Sleep: Seconds Milliseconds
Set-StrictMode: Version Off
Start-Job: Name ScriptBlock ArgumentList InputObject Credential
Get-Job: Id Name InstanceId State IncludeChildJob HasMoreData Newest Before After Command Filter ChildJobState
Wait-Job: Id Job Name InstanceId State Any Timeout Force
Receive-Job: Job Id Name InstanceId Keep Wait AutoRemoveJob WriteEvents WriteJobInResults NoRecurse
Remove-Job: Id Job Name InstanceId State Force
Stop-Job: Id Job Name InstanceId State PassThru
Start-Process: FilePath ArgumentList WorkingDirectory Wait PassThru NoNewWindow RedirectStandardOutput
    RedirectStandardError RedirectStandardInput WindowStyle Verb Credential LoadUserProfile UseNewEnvironment
"""

_COMMON = frozenset(
    {
        "debug",
        "errorvariable",
        "erroraction",
        "informationaction",
        "outbuffer",
        "outvariable",
        "pipelinevariable",
        "verbose",
        "warningaction",
        "warningvariable",
        "confirm",
        "whatif",
    }
)


class UnknownCmdletError(LookupError):
    """A script names a cmdlet or a parameter that Windows does not have, or that vmsnap has no business with."""


def _parse(table: str) -> dict[str, frozenset[str]]:
    cmdlets: dict[str, frozenset[str]] = {}
    name = ""
    for line in table.strip().splitlines():
        head, _, parameters = line.rpartition(":")
        name = head or name
        cmdlets[name] = cmdlets.get(name, frozenset()) | frozenset(parameters.split())
    return cmdlets


CMDLETS = {**_parse(_HYPER_V), **_parse(_OTHERS)}
"""Parameters by cmdlet, as Microsoft writes them."""
HYPER_V = frozenset(_parse(_HYPER_V))
"""The cmdlets of the module Hyper-V."""
_FOLDED = {name.lower(): frozenset(word.lower() for word in words) for name, words in CMDLETS.items()}


def check_call(cmdlet: str, *, parameters: Iterable[str]) -> None:
    r"""Raise UnknownCmdletError for a cmdlet that is not in the table, or a parameter that it does not have.

    A module may be named before the cmdlet (``Hyper-V\Get-VM``). A parameter has to be written out: PowerShell takes any
    beginning of a name that is unambiguous today.
    """
    name = cmdlet.rpartition("\\")[2].lower()
    if name not in _FOLDED:
        raise UnknownCmdletError(f"no script of vmsnap may call {cmdlet!r}")
    for parameter in parameters:
        folded = parameter.lstrip("-").rstrip(":").lower()
        if folded not in _FOLDED[name] | _COMMON:
            raise UnknownCmdletError(f"{cmdlet} has no parameter {parameter!r}")


def snake_case(name: str) -> str:
    """Return the name of a cmdlet or a parameter as the machine spells it: ``Get-VMSwitch`` is ``get_vm_switch``."""
    words = ""
    for place, letter in enumerate(name):
        after = name[place + 1 : place + 2]
        before = name[place - 1 : place]
        if letter == "-":
            words += "_"
        elif letter.isupper() and before not in ("", "-") and (before.islower() or after.islower()):
            words += f"_{letter.lower()}"
        else:
            words += letter.lower()
    return words.replace("vmid", "vm_id").replace("vmname", "vm_name")
