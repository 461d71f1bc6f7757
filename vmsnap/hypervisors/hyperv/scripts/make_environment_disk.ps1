# Make a differencing disk over a stored one.
param(
    [Parameter(Mandatory)] [string] $Path,
    [Parameter(Mandatory)] [string] $Parent
)
$ErrorActionPreference = 'Stop'
$null = New-VHD -Path $Path -ParentPath $Parent -Differencing
