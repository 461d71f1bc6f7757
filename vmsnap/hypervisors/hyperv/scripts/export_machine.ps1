# Export a VM as it runs into an empty folder. The VM goes on.
param(
    [Parameter(Mandatory)] [string] $Id,
    [Parameter(Mandatory)] [string] $Folder,
    [Parameter(Mandatory)] [ValidateSet('CaptureSavedState', 'CaptureCrashConsistentState')] [string] $LiveState
)
$ErrorActionPreference = 'Stop'
$vm = Get-VM -Id $Id
if (([string]$vm.State) -ne 'Running') { throw 'VmsnapNotRunning' }
if (@(Get-ChildItem -LiteralPath $Folder).Count -ne 0) { throw 'VmsnapFolderNotEmpty' }
$null = Export-VM -VM $vm -Path $Folder -CaptureLiveState $LiveState
[pscustomobject]@{ State = [string](Get-VM -Id $Id).State }
