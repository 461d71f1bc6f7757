"""Cmdlets on files, folders, shares and virtual hard disks."""

from __future__ import annotations

from vmsnap.testing.hyperv import failures
from vmsnap.testing.hyperv.failures import Category, Code, Reason
from vmsnap.testing.hyperv.files import BadPathError, InUseError
from vmsnap.testing.hyperv.host import cmdlet
from vmsnap.testing.hyperv.transfer import Transfer
from vmsnap.testing.hyperv.values import Item, SmbShare, VhdType, VirtualHardDisk
from vmsnap.testing.hyperv.vhd import NotAVhdError, read_facts, write_headers

_HEADER_BYTES = 4 << 20


class Folders(Transfer):
    """The host's file system. ``path`` takes wildcards, ``literal_path`` none."""

    @cmdlet("Test-Path")
    def test_path(self, *, path: str | None = None, literal_path: str | None = None, path_type: str = "Any") -> bool:
        """Tell whether there is such a file (Leaf) or folder (Container)."""
        found = [self.files.item(one) for one in self._meant(path, literal_path) if self.files.exists(one)]
        return any(path_type in ("Any", "Container" if item.is_container else "Leaf") for item in found)

    def _meant(self, path: str | None, literal_path: str | None) -> list[str]:
        return [literal_path] if literal_path is not None else self.files.matches(path or "")

    @cmdlet("New-Item")
    def new_item(self, *, path: str, item_type: str = "Directory", force: bool = False) -> Item:
        """Make a folder."""
        if item_type != "Directory":
            raise NotImplementedError(item_type)
        if self.files.exists(path) and not force:
            raise self.speech.file(
                "New-Item",
                word="DirectoryExist",
                category=Category.RESOURCE_EXISTS,
                text=failures.ITEM_EXISTS,
                about=path,
            )
        try:
            return self.files.make_folder(path)
        except BadPathError:
            raise self.speech.file(
                "New-Item",
                word="NewItemArgumentError" if path else "CreateDirectoryArgumentError",
                category=Category.INVALID_ARGUMENT,
                text=failures.BAD_NAME,
                about=path,
            ) from None

    @cmdlet("Remove-Item")
    def remove_item(
        self, *, path: str | None = None, literal_path: str | None = None, recurse: bool = False, force: bool = False
    ) -> None:
        """Remove files and folders. A folder with content asks back, which nobody answers, where ``recurse`` is missing."""
        del force
        meant = self._meant(path, literal_path)
        for one in meant:
            self.between("Remove-Item")
            self._remove(one, recurse=recurse)

    def _remove(self, path: str, *, recurse: bool) -> None:
        try:
            self.files.remove(path, recurse=recurse)
        except (FileNotFoundError, BadPathError):
            raise self._no_path("Remove-Item", path) from None
        except InUseError as error:
            raise self.speech.file(
                "Remove-Item",
                word="RemoveFileSystemItemIOError",
                category=Category.WRITE_ERROR,
                text=failures.IN_USE,
                about=str(error),
            ) from None
        except OSError:
            self.refuse("Remove-Item", text=failures.ASKS_BACK, about=(path,), reason=Reason.OPERATION_FAILED)

    def _no_path(self, cmdlet: str, path: str) -> failures.CmdletError:
        return self.speech.file(
            cmdlet, word="PathNotFound", category=Category.OBJECT_NOT_FOUND, text=failures.NO_PATH, about=path
        )

    @cmdlet("Get-Item")
    def get_item(self, *, literal_path: str) -> Item:
        """Describe a file or folder."""
        try:
            return self.files.item(literal_path)
        except (FileNotFoundError, BadPathError):
            raise self._no_path("Get-Item", literal_path) from None

    @cmdlet("Get-ChildItem")
    def get_child_item(
        self, *, literal_path: str, recurse: bool = False, directory: bool = False, file: bool = False
    ) -> list[Item]:
        """Return what is in a folder."""
        try:
            found = list(self.files.children(literal_path, recurse=recurse))
        except (FileNotFoundError, BadPathError):
            raise self._no_path("Get-ChildItem", literal_path) from None
        return [
            item for item in found if not (directory and not item.is_container) and not (file and item.is_container)
        ]

    @cmdlet("Get-SmbShare")
    def get_smb_share(self, *, name: str | None = None) -> list[SmbShare]:
        """Return the host's shares."""
        found = [
            share for share in self.files.shares.values() if name is None or share.name.casefold() == name.casefold()
        ]
        if name is not None and not found:
            raise failures.CmdletError(
                f"No MSFT_SMBShare objects found with property 'Name' equal to '{name}'.",
                error_id="CmdletizationQuery_NotFound_Name,Get-SmbShare",
                category=Category.OBJECT_NOT_FOUND,
                exception_type="Microsoft.PowerShell.Cmdletization.Cim.CimJobException",
                target=name,
            )
        return found

    @cmdlet("New-VHD")
    def new_vhd(
        self,
        *,
        path: str,
        size_bytes: int | None = None,
        parent_path: str | None = None,
        dynamic: bool = False,
        fixed: bool = False,
        differencing: bool = False,
    ) -> VirtualHardDisk:
        """Make a virtual hard disk: empty, or over a parent, which must not be written from then on."""
        self.need_rights("New-VHD")
        if differencing != (parent_path is not None) or (parent_path is None) != (size_bytes is not None):
            self.bad_argument("New-VHD", "Differencing, ParentPath, SizeBytes")
        kind = VhdType.FIXED if fixed and not dynamic else VhdType.DYNAMIC
        parent = None
        if parent_path is not None:
            try:
                facts = read_facts(self.files.local(parent_path))
            except (OSError, BadPathError):
                self.refuse(
                    "New-VHD",
                    text=failures.NO_FILE,
                    about=(parent_path,),
                    reason=Reason.INVALID_PARAMETER,
                    code=Code.FILE_NOT_FOUND,
                )
            except NotAVhdError:
                self.refuse(
                    "New-VHD",
                    text=failures.NOT_A_VHD,
                    about=(parent_path,),
                    reason=Reason.OPERATION_FAILED,
                    code=Code.CORRUPT,
                )
            if facts.vhd_format == "VHD" and path.lower().endswith(".vhdx"):
                self.bad_argument("New-VHD", "ParentPath")
            size_bytes, parent = facts.size_bytes, (parent_path, facts.linkage)
        size = size_bytes or 0

        def make() -> None:
            place = self.files.local(path)
            if not place.parent.is_dir():
                raise FileNotFoundError(path)
            if place.exists():
                raise FileExistsError(path)
            self.files.charge(path, size_bytes=size if kind is VhdType.FIXED else _HEADER_BYTES)
            write_headers(place, size_bytes=size, vhd_type=kind, parent=parent)

        self.put("New-VHD", path=path, make=make)
        return self._vhd(path)
