//! What puts a guest in memory: kernels, ACPI and SMBIOS tables.
#![forbid(unsafe_code)]
