# Remove a folder of a run, or one part of it. Content where it is gone.
param(
    [Parameter(Mandatory)] [string] $Root,
    [Parameter(Mandatory)] [string] $Name,
    [Parameter(Mandatory)] [AllowEmptyString()] [string] $Part
)
$ErrorActionPreference = 'Stop'
if ($Name -cnotmatch '^vmsnap-[0-9a-f]{10}$' -or $Part -cnotmatch '^[a-z]*$') { throw 'VmsnapNoFolderOfARun' }
$folder = Join-Path -Path $Root -ChildPath $Name
if ($Part) {
    $inside = Join-Path -Path $folder -ChildPath $Part
    if (Test-Path -LiteralPath $inside) { Remove-Item -LiteralPath $inside -Recurse -Force }
    if ((Test-Path -LiteralPath $folder) -and @(Get-ChildItem -LiteralPath $folder).Count -eq 0) {
        Remove-Item -LiteralPath $folder -Force
    }
} elseif (Test-Path -LiteralPath $folder) {
    Remove-Item -LiteralPath $folder -Recurse -Force
}
