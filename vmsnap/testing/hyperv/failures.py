"""How cmdlets fail: error ids and codes as Windows gives them, messages in the host's language.

Ids are ``REASON,CLASS OF THE CMDLET``. The classes of the Hyper-V module were called ``ImportVMCommand`` up to version 1.1
(Windows Server 2012 R2) and are called ``ImportVM`` since. A code of Windows stands, in hexadecimal digits, within the
message: the exception itself has the same HResult whatever happened. Everything else in a message is translated.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum, StrEnum


class ModuleGeneration(IntEnum):
    """The module Hyper-V of Windows Server 2012 R2, or of 2016 and later."""

    FIRST = 1
    SECOND = 2


class Language(StrEnum):
    """The display language of the host."""

    ENGLISH = "en-US"
    GERMAN = "de-DE"


class Code(IntEnum):
    """Windows' codes that cmdlets report within their messages."""

    FILE_NOT_FOUND = 0x80070002
    ACCESS_DENIED = 0x80070005
    OUT_OF_MEMORY = 0x8007000E
    SHARING_VIOLATION = 0x80070020
    DUPLICATE_NAME = 0x80070034
    FILE_EXISTS = 0x80070050
    DISK_FULL = 0x80070070
    INVALID_NAME = 0x8007007B
    IDENTIFIERS_MISMATCH = 0xC03A000E
    CORRUPT = 0xC03A0014
    STATE_INCOMPATIBLE = 0xC0370029


class Category(StrEnum):
    """Members of ``System.Management.Automation.ErrorCategory``."""

    NOT_SPECIFIED = "NotSpecified"
    INVALID_ARGUMENT = "InvalidArgument"
    INVALID_OPERATION = "InvalidOperation"
    OBJECT_NOT_FOUND = "ObjectNotFound"
    PERMISSION_DENIED = "PermissionDenied"
    RESOURCE_EXISTS = "ResourceExists"
    WRITE_ERROR = "WriteError"
    DEVICE_ERROR = "DeviceError"


class Reason(Enum):
    """Why the Hyper-V module refuses: the first part of the id, and the category."""

    OPERATION_FAILED = ("OperationFailed", Category.NOT_SPECIFIED)
    INVALID_PARAMETER = ("InvalidParameter", Category.INVALID_ARGUMENT)
    INVALID_STATE = ("InvalidState", Category.INVALID_OPERATION)
    OUT_OF_MEMORY = ("OutOfMemory", Category.NOT_SPECIFIED)
    ACCESS_DENIED = ("AccessDenied", Category.PERMISSION_DENIED)
    CONFIGURATION = ("OperationFailed", Category.INVALID_OPERATION)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A sentence in each language. ``{}`` stands for what it is about."""

    english: str
    german: str

    def fill(self, language: Language, *about: object) -> str:
        """Return the sentence in a language."""
        sentence = self.german if language is Language.GERMAN else self.english
        return sentence.format(*about)


class CmdletError(Exception):
    """One error record. ``terminating``: thrown by the pipeline and not only written to the error stream.

    ``exception_type`` is the .NET class. ``hresult`` is what the exception's HResult says, as a signed 32-bit number.
    """

    hresult = -2146233088

    def __init__(
        self, message: str, *, error_id: str, category: Category, exception_type: str, target: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.error_id = error_id
        self.category = category
        self.exception_type = exception_type
        self.target = target


_VIRTUALIZATION = {
    ModuleGeneration.FIRST: "Microsoft.HyperV.PowerShell.VirtualizationOperationFailedException",
    ModuleGeneration.SECOND: "Microsoft.HyperV.PowerShell.VirtualizationException",
}


@dataclass(frozen=True, kw_only=True)
class Speech:
    """How this host words its errors."""

    generation: ModuleGeneration = ModuleGeneration.SECOND
    language: Language = Language.ENGLISH

    def hyper_v(
        self, cmdlet: str, *, text: Text, about: tuple[object, ...] = (), reason: Reason, code: Code | None = None
    ) -> CmdletError:
        """Return the error of a cmdlet of the Hyper-V module."""
        word, category = reason.value
        message = text.fill(self.language, *about)
        if code is not None:
            message = f"{message} ({code:#010X}).".replace("(0X", "(0x")
        name = "Microsoft.HyperV.PowerShell.Commands." + cmdlet.replace("-", "")
        if self.generation is ModuleGeneration.FIRST:
            name += "Command"
        untold = reason is Reason.CONFIGURATION and self.generation is ModuleGeneration.FIRST
        return CmdletError(
            message,
            error_id=name if untold else f"{word},{name}",
            category=Category.NOT_SPECIFIED if untold else category,
            exception_type=_VIRTUALIZATION[self.generation],
            target=str(about[0]) if about else "",
        )

    def file(self, cmdlet: str, *, word: str, category: Category, text: Text, about: str) -> CmdletError:
        """Return the error of a cmdlet that works on files."""
        return CmdletError(
            text.fill(self.language, about),
            error_id=f"{word},Microsoft.PowerShell.Commands.{cmdlet.replace('-', '')}Command",
            category=category,
            exception_type="System.Management.Automation.ItemNotFoundException"
            if category is Category.OBJECT_NOT_FOUND
            else "System.IO.IOException",
            target=about,
        )


NO_SUCH_VM = Text(
    english='Hyper-V was unable to find a virtual machine with name "{}".',
    german='Hyper-V konnte keinen virtuellen Computer mit dem Namen "{}" finden.',
)
NO_RIGHT = Text(
    english="You do not have the required permission to complete this task. Contact the administrator of the "
    "authorization policy for the computer '{}'.",
    german="Sie besitzen nicht die erforderliche Berechtigung, um diese Aufgabe auszuführen. Wenden Sie sich an den "
    "Administrator der Autorisierungsrichtlinie für den Computer '{}'.",
)
WRONG_STATE = Text(
    english="'{}' failed to change state: the operation cannot be performed while the virtual machine is in its current state.",
    german="Fehler bei '{}': Der Vorgang kann nicht ausgeführt werden, während sich der virtuelle Computer im aktuellen "
    "Zustand befindet.",
)
NOT_STARTED = Text(english="'{}' failed to start. {}", german="'{}' konnte nicht gestartet werden. {}")
NO_MEMORY = Text(
    english="Not enough memory in the system to start the virtual machine '{}'",
    german="Nicht genügend Arbeitsspeicher im System, um den virtuellen Computer '{}' zu starten",
)
NO_FILE = Text(
    english="The system cannot find the file specified: '{}'",
    german="Das System kann die angegebene Datei nicht finden: '{}'",
)
IN_USE = Text(
    english="The process cannot access the file '{}' because it is being used by another process.",
    german="Der Prozess kann nicht auf die Datei '{}' zugreifen, da sie von einem anderen Prozess verwendet wird.",
)
EXISTS = Text(
    english="Failed to copy file to '{}': The file exists.",
    german="Fehler beim Kopieren nach '{}': Die Datei existiert.",
)
FULL = Text(
    english="Failed to write '{}': There is not enough space on the disk.",
    german="Fehler beim Schreiben von '{}': Es steht nicht genug Speicherplatz auf dem Datenträger zur Verfügung.",
)
BAD_NAME = Text(
    english="The filename, directory name, or volume label syntax is incorrect: '{}'",
    german="Die Syntax für den Dateinamen, Verzeichnisnamen oder die Datenträgerbezeichnung ist falsch: '{}'",
)
BAD_ARGUMENT = Text(english="A parameter is not valid: {}", german="Ein Parameter ist ungültig: {}")
NEEDS_REPAIR = Text(
    english="Unable to import virtual machine due to configuration errors. Please use Compare-VM to repair the virtual machine.",
    german="Der virtuelle Computer kann aufgrund von Konfigurationsfehlern nicht importiert werden. Reparieren Sie ihn mit "
    "Compare-VM.",
)
TAKEN_ID = Text(
    english="The operation failed because a virtual machine with the identifier '{}' already exists.",
    german="Fehler beim Vorgang, weil bereits ein virtueller Computer mit dem Bezeichner '{}' vorhanden ist.",
)
NO_SWITCH = Text(
    english="Could not find Ethernet switch '{}'.",
    german="Der Ethernet-Switch '{}' konnte nicht gefunden werden.",
)
SWITCH_USED = Text(
    english="The virtual switch '{}' cannot be deleted because it is being used by running virtual machines.",
    german="Der virtuelle Switch '{}' kann nicht gelöscht werden, da er von ausgeführten virtuellen Computern verwendet wird.",
)
SAME_MAC = Text(
    english="'{}' failed to start. Synthetic Ethernet Port: a network adapter with the same MAC address is in use",
    german="'{}' konnte nicht gestartet werden. Synthetischer Ethernetport: Die MAC-Adresse wird bereits verwendet",
)
BAD_STATE_FILE = Text(
    english="'{}' failed to restore: the saved state is not compatible with this virtual machine",
    german="'{}' konnte nicht wiederhergestellt werden: Der gespeicherte Zustand ist nicht kompatibel",
)
NOT_EXPORTABLE = Text(
    english="The virtual machine '{}' cannot be exported because of its storage: {}",
    german="Der virtuelle Computer '{}' kann wegen seines Speichers nicht exportiert werden: {}",
)
NOT_A_VHD = Text(
    english="The file '{}' is not a virtual hard disk, or is damaged",
    german="Die Datei '{}' ist keine virtuelle Festplatte oder ist beschädigt",
)
BROKEN_CHAIN = Text(
    english="The chain of virtual hard disks is corrupted: '{}'. The identifiers do not match",
    german="Die Kette der virtuellen Festplatten ist beschädigt: '{}'. Die Bezeichner stimmen nicht überein",
)
ASKS_BACK = Text(
    english="A command that prompts the user failed because the host program or the command type does not support user "
    "interaction: {}",
    german="Fehler bei einem Befehl mit Rückfrage, da das Hostprogramm keine Benutzerinteraktion unterstützt: {}",
)
NO_PATH = Text(
    english="Cannot find path '{}' because it does not exist.",
    german='Der Pfad "{}" kann nicht gefunden werden, da er nicht vorhanden ist.',
)
ITEM_EXISTS = Text(
    english="An item with the specified name {} already exists.",
    german="Ein Element mit dem angegebenen Namen {} ist bereits vorhanden.",
)
