# On which volume folders lie, and where on it. Changes nothing.
$methods = Add-Type -PassThru -Namespace Vmsnap -Name Paths -MemberDefinition @'
[DllImport("kernel32.dll", CharSet = CharSet.Unicode, SetLastError = true)]
public static extern IntPtr CreateFile(string name, uint access, uint share, IntPtr security, uint how, uint flags, IntPtr template);
[DllImport("kernel32.dll", CharSet = CharSet.Unicode, SetLastError = true)]
public static extern uint GetFinalPathNameByHandle(IntPtr handle, System.Text.StringBuilder path, uint length, uint flags);
[DllImport("kernel32.dll")]
public static extern bool CloseHandle(IntPtr handle);
'@
$found = @(foreach ($folder in $given.Folders) {
    $handle = $methods::CreateFile($folder, 0, 7, [IntPtr]::Zero, 3, 0x02000000, [IntPtr]::Zero)
    $path = New-Object System.Text.StringBuilder 32768
    $length = $methods::GetFinalPathNameByHandle($handle, $path, 32768, 1)
    $null = $methods::CloseHandle($handle)
    if ($length -eq 0) { throw "no such folder: $folder" }
    $volume = $path.ToString().Substring(0, 48)
    @{
        Folder = [string]$folder
        Volume = $volume
        Inside = $path.ToString().Substring(48)
        Facts  = [string](& fsutil.exe fsinfo ntfsinfo $volume | Out-String)
    }
})
ConvertTo-Json -Compress -Depth 3 -InputObject $found
