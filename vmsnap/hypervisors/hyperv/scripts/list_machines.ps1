# Every VM of this host. The tag in its notes says whose it is; the folder does where the notes were not written yet.
param()
$ErrorActionPreference = 'Stop'
foreach ($vm in @(Get-VM)) {
    [pscustomobject]@{
        Id     = [string]$vm.Id
        Name   = [string]$vm.Name
        State  = [string]$vm.State
        Notes  = [string]$vm.Notes
        Folder = [string]$vm.Path
    }
}
