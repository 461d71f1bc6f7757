# The PostgreSQL services of this guest, and every server process, however it was started. Changes nothing.
$services = @(foreach ($service in @(Get-CimInstance -ClassName Win32_Service)) {
    if ($service.PathName -notmatch '\\pg_ctl(\.exe)?"?\s+runservice\s') { continue }
    @{
        Service     = [string]$service.Name
        State       = [string]$service.State
        Starts      = [string]$service.StartMode
        CommandLine = [string]$service.PathName
    }
})
$servers = @(foreach ($process in @(Get-CimInstance -ClassName Win32_Process -Filter "Name = 'postgres.exe'")) {
    @{ Pid = [int]$process.ProcessId; Parent = [int]$process.ParentProcessId }
})
ConvertTo-Json -Compress -Depth 3 -InputObject @{ Services = $services; Servers = $servers }
