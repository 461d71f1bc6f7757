# Forget a clone or an environment that is off or saved; its disks stay. Refuses any VM without the tag and outside the
# folder of its run.
param(
    [Parameter(Mandatory)] [string] $Id,
    [Parameter(Mandatory)] [string] $Tag,
    [Parameter(Mandatory)] [string] $Folder
)
$ErrorActionPreference = 'Stop'
$vm = Get-VM -Id $Id
$tagged = ([string]$vm.Notes).StartsWith($Tag, [System.StringComparison]::Ordinal)
$inside = ([string]$vm.Path).StartsWith("$Folder\", [System.StringComparison]::OrdinalIgnoreCase)
if (-not ($tagged -or $inside)) { throw 'VmsnapNotOurs' }
Remove-VM -VM $vm -Force
