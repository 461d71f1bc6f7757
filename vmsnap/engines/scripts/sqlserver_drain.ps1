# Follows sqlserver_open: puts the server in its lame duck, waits for work in flight, ends the rest, orders the server to stop.
[Console]::Out.WriteLine('vmsnap-drain opened')
$look = @'
SELECT s.session_id AS id, COALESCE(r.request_id, -1) AS request,
       COALESCE(CONVERT(varchar(30), r.start_time, 126), '') AS began,
       COALESCE(t.transaction_id, 0) AS work,
       CASE WHEN r.session_id IS NULL THEN 0 ELSE 1 END AS executes,
       CASE WHEN r.wait_type LIKE 'HADR_SYNC_COMMIT%' THEN 1 ELSE 0 END AS awaits_replica,
       CASE WHEN r.session_id IS NULL OR r.wait_type = 'ASYNC_NETWORK_IO' THEN 1 ELSE 0 END AS awaits_client,
       CASE WHEN c.client_net_address IS NULL
              OR c.client_net_address IN ('<local machine>', '<named pipe>', '127.0.0.1', '::1') THEN 1 ELSE 0 END AS near
  FROM sys.dm_exec_sessions AS s
  LEFT JOIN sys.dm_exec_requests AS r ON r.session_id = s.session_id
  LEFT JOIN (SELECT session_id, MAX(transaction_id) AS transaction_id
               FROM sys.dm_tran_session_transactions
              WHERE is_user_transaction = 1
              GROUP BY session_id) AS t ON t.session_id = s.session_id
  LEFT JOIN sys.dm_exec_connections AS c ON c.session_id = s.session_id AND c.parent_connection_id IS NULL
 WHERE s.is_user_process = 1 AND s.session_id <> @@SPID
'@
function Stop-Session($Id) {
    # A session that went by itself meanwhile cannot be killed (error 6106), nor one that is being rolled back.
    try { Invoke-Statement "KILL $([int]$Id)" } catch [System.Data.SqlClient.SqlException] { return }
}
Suspend-Service -Name $given.Service
(Get-Service -Name $given.Service).WaitForStatus('Paused', [TimeSpan]::FromSeconds(20))
$clock = [System.Diagnostics.Stopwatch]::StartNew()
$deadline = [double]$given.DeadlineMs
$patience = [double]$given.PatienceMs
$work = @{}
$cut = @{}
$stuck = @{}
$inFlight = 0
$finished = 0
$rolledBack = 0
$first = $true
while ($true) {
    $here = @{}
    foreach ($row in @(Read-Rows $look)) {
        $id = [int]$row.id
        $here[$id] = $true
        if ($cut.ContainsKey($id)) { continue }
        $mark = if ([long]$row.work -ne 0) { "t$($row.work)" } elseif ($row.executes -eq 1) { "r$($row.request) $($row.began)" } else { '' }
        if ($first -and $mark) { $inFlight += 1; $work[$id] = @{ Mark = $mark; Executes = [bool]$row.executes } }
        if (-not $work.ContainsKey($id)) { Stop-Session $id; continue }
        if ($row.awaits_replica -eq 1 -or $mark -ne $work[$id].Mark) {
            # Done, or committed and waiting for a replica that cannot answer. What it does now is new.
            $finished += 1
            $work.Remove($id)
            Stop-Session $id
            continue
        }
        $work[$id].Executes = [bool]$row.executes
        if ($row.awaits_client -eq 1 -and $row.near -eq 0) { if (-not $stuck.ContainsKey($id)) { $stuck[$id] = $clock.Elapsed.TotalMilliseconds } }
        else { $stuck.Remove($id) }
        $forsaken = $stuck.ContainsKey($id) -and ($clock.Elapsed.TotalMilliseconds - $stuck[$id]) -ge $patience
        if ($clock.Elapsed.TotalMilliseconds -ge $deadline -or $forsaken) {
            $work.Remove($id)
            $cut[$id] = $true
            $rolledBack += 1
            Stop-Session $id
        }
    }
    $first = $false
    foreach ($id in @($work.Keys)) {
        if ($here.ContainsKey($id)) { continue }
        # Gone between two looks: what was executing may have ended and its client left; what waited was cut off.
        if ($work[$id].Executes) { $finished += 1 } else { $rolledBack += 1 }
        $work.Remove($id)
    }
    if ($work.Count -eq 0) { break }
    Start-Sleep -Milliseconds 100
}
$prepared = [int]@(Read-Rows 'SELECT COUNT(*) AS answer FROM sys.dm_tran_active_transactions WHERE dtc_state = 2')[0].answer
# A new error log, short enough to be read whole from the disk.
Invoke-Statement 'EXEC sp_cycle_errorlog'
$result = @{ in_flight = $inFlight; finished = $finished; rolled_back = $rolledBack; prepared = $prepared; seconds = [Math]::Round($clock.Elapsed.TotalSeconds, 3) }
[Console]::Out.WriteLine('vmsnap-drain result ' + (ConvertTo-Json -Compress -InputObject $result))
# No session can be opened while the service is paused: the order to stop is given in this one. It waits for what runs, and
# writes a checkpoint in every database.
$order = $session.CreateCommand()
$order.CommandText = 'SHUTDOWN'
try { $null = $order.ExecuteNonQuery() } catch [System.Data.SqlClient.SqlException] { exit 0 }
