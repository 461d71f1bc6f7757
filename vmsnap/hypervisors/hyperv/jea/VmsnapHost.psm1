# The scripts of vmsnap as functions, for a session in which no other text is run: export_machine.ps1 becomes
# Invoke-VmsnapExportMachine. The folder "scripts" beside this file is vmsnap's own; after an update of vmsnap copy it again.
$ErrorActionPreference = 'Stop'
foreach ($file in @(Get-ChildItem -LiteralPath (Join-Path -Path $PSScriptRoot -ChildPath 'scripts') -Filter '*.ps1' -File)) {
    $words = $file.BaseName -split '_' | ForEach-Object { $_.Substring(0, 1).ToUpperInvariant() + $_.Substring(1) }
    $body = [scriptblock]::Create((Get-Content -LiteralPath $file.FullName -Raw -Encoding UTF8))
    Set-Item -Path ('function:script:Invoke-Vmsnap' + ($words -join '')) -Value $body
}
Export-ModuleMember -Function 'Invoke-Vmsnap*'
