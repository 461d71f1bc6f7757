# Runs a script of psql in one session. What the script starts finds the server by two variables.
$env:VMSNAP_PG_CTL = $given.PgCtl
$env:VMSNAP_PGDATA = $given.DataDirectory
$env:PGCLIENTENCODING = 'UTF8'
$env:LC_ALL = 'C'
$env:LC_MESSAGES = 'C'
$words = @('-XqAtw', '-v', "deadline_s=$($given.Deadline)", '-v', "patience_s=$($given.Patience)")
$words += @('-h', '127.0.0.1', '-p', $given.Port, '-U', $given.User, '-d', $given.Database, '-f', '-')
$given.Script | & $given.Psql @words
exit $LASTEXITCODE
