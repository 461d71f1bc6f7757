# Ask the guest of a clone to shut down, as an operator would in the guest. Never ends it: Stop-VM would, in the end.
param(
    [Parameter(Mandatory)] [string] $Id,
    [Parameter(Mandatory)] [string] $Tag,
    [Parameter(Mandatory)] [string] $Reason
)
$ErrorActionPreference = 'Stop'
$vm = Get-VM -Id $Id
if (-not ([string]$vm.Notes).StartsWith($Tag, [System.StringComparison]::Ordinal)) { throw 'VmsnapNotOurs' }
$component = Get-CimInstance -Namespace root/virtualization/v2 -ClassName Msvm_ShutdownComponent |
    Where-Object { $_.SystemName -eq $Id } | Select-Object -First 1
$answer = -1
if ($null -ne $component) {
    $answer = (Invoke-CimMethod -InputObject $component -MethodName InitiateShutdown -Arguments @{ Force = $false; Reason = $Reason }).ReturnValue
}
[pscustomobject]@{ ReturnValue = [long]$answer }
