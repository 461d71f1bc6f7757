# What addresses the adapters with these MACs have; with Renew, their DHCP clients begin anew before that.
function Get-Wanted {
    $all = @(Get-CimInstance -ClassName Win32_NetworkAdapterConfiguration)
    @($all | Where-Object { $_.MACAddress -and $given.Macs -contains ([string]$_.MACAddress).ToLowerInvariant() })
}
if ($given.Renew -eq 1) {
    foreach ($one in @(Get-Wanted | Where-Object { $_.DHCPEnabled })) {
        # What these return is no matter: there may be nothing to release, and what was renewed shows below.
        $null = Invoke-CimMethod -InputObject $one -MethodName ReleaseDHCPLease
        $null = Invoke-CimMethod -InputObject $one -MethodName RenewDHCPLease
    }
}
$found = @(foreach ($one in @(Get-Wanted)) {
    @{
        Mac       = ([string]$one.MACAddress).ToLowerInvariant()
        Dhcp      = [bool]$one.DHCPEnabled
        Addresses = @($one.IPAddress | Where-Object { $_ -and $_ -notmatch ':' } | ForEach-Object { [string]$_ })
    }
})
ConvertTo-Json -Compress -Depth 3 -InputObject $found
