# Make a folder of a run, and those above it. Content where it is there.
param(
    [Parameter(Mandatory)] [string] $Root,
    [Parameter(Mandatory)] [string] $Name,
    [Parameter(Mandatory)] [string] $Part
)
$ErrorActionPreference = 'Stop'
if ($Name -cnotmatch '^vmsnap-[0-9a-f]{10}$' -or $Part -cnotmatch '^[a-z]+$') { throw 'VmsnapNoFolderOfARun' }
$null = New-Item -ItemType Directory -Force -Path (Join-Path -Path (Join-Path -Path $Root -ChildPath $Name) -ChildPath $Part)
