# From the 32-bit entry of PVH or multiboot (flat segments, no paging, EBX = boot information) to long mode.

    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18                      # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long boot_entry

    .section .text.boot, "ax"
    .code32
    .globl boot_entry
boot_entry:
    cli
    cld
    mov dword ptr [boot_magic], eax
    mov dword ptr [boot_info], ebx
    mov esp, offset boot_stack_top
    call enable_long_mode
    lgdt [boot_gdtr]
    .byte 0xea                          # jmp 8:boot64
    .long boot64
    .word 8

    # Turns paging and long mode on; the caller is then in compatibility mode. Clobbers EAX, ECX, EDX.
    .globl enable_long_mode
enable_long_mode:
    mov eax, 0x620                      # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x900                       # LME, NXE
    wrmsr
    mov eax, 0x80010033                 # PG, WP, NE, ET, MP, PE
    mov cr0, eax
    ret

    .code64
boot64:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov esp, offset boot_stack_top
    fninit
    xor ebp, ebp
    call guest_main
    ud2

    # A second CPU: SIPI_PAGE is copied to 0x8000 and started in real mode.
    .globl sipi_start, sipi_end
    .code16
sipi_start:
    cli
    cld
    xor ax, ax
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16        # lgdt [0x8000 + …], 32-bit operand
    .word 0x8000 + sipi_gdtr - sipi_start
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea                    # jmp 0x38:sipi32
    .long sipi32
    .word 0x38
    .balign 4
sipi_gdtr:
    .word 511
    .long boot_gdt
sipi_end:

    .code32
sipi32:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, offset second_stack_top
    call enable_long_mode
    .byte 0xea
    .long second64
    .word 8
    .code64
second64:
    mov esp, offset second_stack_top
    xor eax, eax
    mov fs, eax
    mov gs, eax
    fninit
    xor ebp, ebp
    call second_main
    ud2

    .data
    .balign 16
    .globl boot_gdt, boot_gdtr, boot_magic, boot_info
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # 0x08 code, 64-bit, ring 0
    .quad 0x00cf93000000ffff            # 0x10 data, ring 0
    .quad 0x00cffb000000ffff            # 0x18 code, 32-bit, ring 3   (SYSRET, SYSEXIT)
    .quad 0x00cff3000000ffff            # 0x20 data, ring 3
    .quad 0x00affb000000ffff            # 0x28 code, 64-bit, ring 3
    .quad 0x00cff3000000ffff            # 0x30 data, ring 3
    .quad 0x00cf9b000000ffff            # 0x38 code, 32-bit, ring 0
    .fill 56, 8, 0                      # 0x40 TSS; from 0x80 free for tests
boot_gdtr:
    .word 511
    .quad boot_gdt
boot_magic: .long 0
boot_info: .long 0

    .balign 4096
    .globl boot_pml4, boot_pdpt, test_pd, test_pt
boot_pml4:
    .quad boot_pdpt + 7
    .fill 511, 8, 0
boot_pdpt:
    .quad low_pd + 7, user_pd + 7, test_pd + 7, device_pd + 7
    .fill 508, 8, 0
low_pd:
    .set page, 0
    .rept 512
    .quad (page << 21) | 0x83
    .set page, page + 1
    .endr
user_pd:
    .set page, 0
    .rept 512
    .quad (page << 21) | 0x87
    .set page, page + 1
    .endr
device_pd:
    .set page, 1536
    .rept 512
    .quad (page << 21) | 0x9b
    .set page, page + 1
    .endr
test_pd:
    .quad test_pt + 7
    .fill 511, 8, 0
test_pt:
    .fill 512, 8, 0

    .bss
    .balign 16
    .fill 65536
    .globl boot_stack_top
boot_stack_top:
    .fill 32768
second_stack_top:
    .text
