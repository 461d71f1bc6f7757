# Forget a machine that was only planned. Content where it is gone.
param([Parameter(Mandatory)] [string] $Id)
$ErrorActionPreference = 'Stop'
$service = Get-CimInstance -Namespace root/virtualization/v2 -ClassName Msvm_VirtualSystemManagementService
foreach ($planned in @(Get-CimInstance -Namespace root/virtualization/v2 -ClassName Msvm_PlannedComputerSystem)) {
    if ($planned.Name -eq $Id) {
        $null = Invoke-CimMethod -InputObject $service -MethodName DestroySystem -Arguments @{ AffectedSystem = $planned }
    }
}
