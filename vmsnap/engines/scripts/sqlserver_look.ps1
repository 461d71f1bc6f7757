# Follows sqlserver_open: where the databases' files are, and which databases are not to be captured. Changes nothing.
$files = @(Read-Rows 'SELECT physical_name AS name FROM sys.master_files' | ForEach-Object { [string]$_.name })
$unready = @(Read-Rows 'SELECT name, state_desc AS state FROM sys.databases WHERE state <> 0' | ForEach-Object { "$($_.name): $($_.state)" })
$copies = @(Read-Rows "SELECT DB_NAME(database_id) AS name FROM sys.dm_hadr_database_replica_states WHERE is_local = 1 AND is_primary_replica = 0" | ForEach-Object { [string]$_.name })
ConvertTo-Json -Compress -Depth 3 -InputObject @{ Files = $files; Unready = $unready; Copies = $copies }
