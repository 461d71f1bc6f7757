# The state of the service, and its error log. Changes nothing.
$service = Get-Service -Name $given.Service
$bytes = [System.IO.File]::ReadAllBytes($given.ErrorLog)
ConvertTo-Json -Compress -InputObject @{ State = [string]$service.Status; Log = [Convert]::ToBase64String($bytes) }
