# The module that holds vmsnap's scripts on a Hyper-V host. See docs/hyper-v.md.
@{
    RootModule        = 'VmsnapHost.psm1'
    ModuleVersion     = '1.0.0'
    GUID              = '5d0d1e6c-6f5f-4c0e-9a53-2d8c5c1b7f10'
    Author            = 'vmsnap'
    PowerShellVersion = '5.1'
    RequiredModules   = @('Hyper-V')
    FunctionsToExport = 'Invoke-Vmsnap*'
    CmdletsToExport   = @()
    AliasesToExport   = @()
    VariablesToExport = @()
}
