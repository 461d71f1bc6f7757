# Waits until the service has stopped; tells it to where nobody did.
$service = Get-Service -Name $given.Service
if ($service.Status -ne 'Stopped') {
    # A paused service takes the order to stop as well; sqlservr.exe then ends as SHUTDOWN does.
    if ($service.Status -ne 'StopPending') {
        try { $service.Stop() } catch [System.InvalidOperationException] { $null = $_ }
    }
    try { $service.WaitForStatus('Stopped', [TimeSpan]::FromMilliseconds([double]$given.DeadlineMs)) }
    catch [System.ServiceProcess.TimeoutException] { $null = $_ }
}
$service.Refresh()
ConvertTo-Json -Compress -InputObject @{ State = [string]$service.Status }
