# What lies in the folder of an export: configurations, and the size of saved memory. Changes nothing.
param([Parameter(Mandatory)] [string] $Folder)
$ErrorActionPreference = 'Stop'
foreach ($file in @(Get-ChildItem -LiteralPath $Folder -Recurse -File)) {
    [pscustomobject]@{
        Path      = [string]$file.FullName
        Extension = ([string]$file.Extension).ToLowerInvariant()
        SizeBytes = [long]$file.Length
    }
}
