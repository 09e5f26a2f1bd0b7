# Every vector ends in trap_common with a Frame on the stack (see trap.rs).

    .text
    .code64
    .balign 16
    .globl trap_stubs
trap_stubs:                             # 16 bytes each
    .set vector, 0
    .rept 256
    .balign 16
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)
    .else
    push 0
    .endif
    push vector - 128                   # fits one byte; trap_common adds 128 again
    jmp trap_common
    .set vector, vector + 1
    .endr

trap_common:
    add qword ptr [rsp], 128
    push r15
    push r14
    push r13
    push r12
    push r11
    push r10
    push r9
    push r8
    push rdi
    push rsi
    push rbp
    push rdx
    push rcx
    push rbx
    push rax
    mov rdi, rsp
    mov rbx, rsp
    sub rsp, 512
    and rsp, -16
    mov r12, cr0
    mov rax, r12
    and rax, -13                        # a test may have set TS or EM
    mov cr0, rax
    fxsave64 [rsp]
    cld
    call trap_handler
    fxrstor64 [rsp]
    test al, al                         # caught: TS and EM stay clear
    jnz 2f
    mov cr0, r12
2:  mov rsp, rbx
trap_return:
    pop rax
    pop rbx
    pop rcx
    pop rdx
    pop rbp
    pop rsi
    pop rdi
    pop r8
    pop r9
    pop r10
    pop r11
    pop r12
    pop r13
    pop r14
    pop r15
    add rsp, 16
    iretq

    # catch_call(f, argument): 0 when f returned, 1 when an exception was caught.
    .globl catch_call, catch_resume
catch_call:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov qword ptr [rip + CATCH_RSP], rsp
    sub rsp, 8
    mov rax, rdi
    mov rdi, rsi
    call rax
    xor eax, eax
    jmp 2f
catch_resume:
    mov eax, 1
2:  mov rsp, qword ptr [rip + CATCH_RSP]
    mov qword ptr [rip + CATCH_RSP], 0
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    cld
    ret

    # enter_frame(frame): goes to the state that the frame describes.
    .globl enter_frame
enter_frame:
    mov rsp, rdi
    jmp trap_return
