# The instances of SQL Server in this guest, by the services that run them, and every server process. Changes nothing.
$base = 'HKLM:\SOFTWARE\Microsoft\Microsoft SQL Server'
$names = Get-ItemProperty -LiteralPath "$base\Instance Names\SQL" -ErrorAction SilentlyContinue
$services = @(foreach ($service in @(Get-CimInstance -ClassName Win32_Service)) {
    if ($service.PathName -notmatch '\\sqlservr\.exe') { continue }
    $instance = $service.Name -replace '^MSSQL\$', ''
    $id = [string]$names.$instance
    $setup = Get-ItemProperty -LiteralPath "$base\$id\Setup"
    $parameters = Get-ItemProperty -LiteralPath "$base\$id\MSSQLServer\Parameters"
    $arguments = @($parameters.PSObject.Properties | Where-Object { $_.Name -like 'SQLArg*' } | ForEach-Object { [string]$_.Value })
    $log = [string]($arguments | Where-Object { $_ -clike '-e*' } | Select-Object -First 1)
    @{
        Service  = [string]$service.Name
        State    = [string]$service.State
        Starts   = [string]$service.StartMode
        Process  = [int]$service.ProcessId
        Account  = [string]$service.StartName
        Version  = [string]$setup.Version
        Folder   = [string]$setup.SQLPath
        ErrorLog = $log -creplace '^-e', ''
    }
})
$servers = @(Get-CimInstance -ClassName Win32_Process -Filter "Name = 'sqlservr.exe'" | ForEach-Object { [int]$_.ProcessId })
ConvertTo-Json -Compress -Depth 3 -InputObject @{ Services = $services; Servers = $servers }
