# Opens a session of an administrator, over shared memory, with the .NET Framework's own client. Other scripts follow it.
$session = New-Object System.Data.SqlClient.SqlConnection
$session.ConnectionString = "Server=$($given.Server);Database=master;Integrated Security=SSPI;Application Name=vmsnap;Pooling=false;Connect Timeout=20"
$session.Open()
function Read-Rows([string] $Text) {
    $command = $session.CreateCommand()
    $command.CommandText = $Text
    $command.CommandTimeout = 60
    $table = New-Object System.Data.DataTable
    $reader = $command.ExecuteReader()
    try { $table.Load($reader) } finally { $reader.Close() }
    $table.Rows
}
function Invoke-Statement([string] $Text) {
    $command = $session.CreateCommand()
    $command.CommandText = $Text
    $command.CommandTimeout = 60
    $null = $command.ExecuteNonQuery()
}
if (@(Read-Rows "SELECT COALESCE(IS_SRVROLEMEMBER('sysadmin'), 0) AS answer")[0].answer -ne 1) { throw 'vmsnap: no sysadmin' }
