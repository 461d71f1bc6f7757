# The folders of runs. Changes nothing.
param([Parameter(Mandatory)] [string] $Root)
$ErrorActionPreference = 'Stop'
if (Test-Path -LiteralPath $Root -PathType Container) {
    foreach ($folder in @(Get-ChildItem -LiteralPath $Root -Directory)) {
        if ($folder.Name -match '^vmsnap-[0-9a-f]{10}$') {
            [pscustomobject]@{
                Name   = [string]$folder.Name
                Parts  = [string](@(Get-ChildItem -LiteralPath $folder.FullName -Directory | ForEach-Object { $_.Name }) -join ' ')
            }
        }
    }
}
