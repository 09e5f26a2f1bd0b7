# From long mode to 32-bit protected mode without paging, and back.

    .text
    .code64
    # legacy_call(function): 1 when an exception ended it (see legacy_trap), 0 when it returned.
    .globl legacy_call
legacy_call:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov qword ptr [rip + legacy_rsp], rsp
    push 0x38
    lea rax, [rip + 2f]
    push rax
    retfq
    .code32
2:  mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, offset legacy_stack_top
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov ecx, 0xc0000080
    rdmsr
    and eax, 0xfffffeff
    wrmsr
    lidt [legacy_idtr]
    call edi
    xor ebx, ebx
legacy_back:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0xfffffff7                 # a task switch sets TS
    or eax, 0x80000000
    mov cr0, eax
    .byte 0xea
    .long legacy64
    .word 8
    .code64
legacy64:
    mov rsp, qword ptr [rip + legacy_rsp]
    push 2
    popfq
    mov eax, ebx
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    .code32
    .balign 16
    .globl legacy_stubs
legacy_stubs:                           # 16 bytes each, of vectors 0 to 63
    .set vector, 0
    .rept 64
    .balign 16
    push vector
    jmp legacy_common
    .set vector, vector + 1
    .endr

legacy_common:
    mov eax, 0x10
    mov ds, eax
    pop ecx
    mov dword ptr [legacy_trap], ecx
    xor ebx, ebx
    mov eax, 0x227d00                   # vectors with an error code
    bt eax, ecx
    jnc 2f
    pop ebx
2:  mov dword ptr [legacy_trap + 4], ebx
    pop dword ptr [legacy_trap + 8]
    pop dword ptr [legacy_trap + 12]
    pop dword ptr [legacy_trap + 16]
    str eax
    mov dword ptr [legacy_trap + 20], eax
    mov ebx, 1
    jmp legacy_back
    .code64

    .data
    .balign 8
    .globl legacy_trap, legacy_idt
legacy_rsp: .quad 0
legacy_trap: .fill 6, 4, 0
legacy_idtr:
    .word 511
    .long legacy_idt
    .balign 8
legacy_idt: .fill 64, 8, 0
    .bss
    .balign 16
    .fill 4096
legacy_stack_top:
    .text
