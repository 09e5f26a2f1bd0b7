//! The machine code that takes a whole register state into the tested instruction and out of it.
//!
//! It is copied to a fixed low address, so that 32-bit code reaches it, with [`Data`] in the page after it. All its
//! references are relative to RIP: no register is free while a case's state is loaded.

use std::mem::offset_of;

/// Where the child maps its parts: all below 2 GiB.
pub const BLOB: u64 = 0x1000_0000;
pub const BLOB_SIZE: usize = 0x1000;
pub const DATA_PAGES: u64 = BLOB + BLOB_SIZE as u64;

/// What the machine code and the child's Rust code share.
#[repr(C, align(4096))]
pub struct Data {
    pub xsave_in: [u8; 832],
    /// Stands on a 64-byte boundary, as XSAVE wants.
    pub xsave_out: [u8; 832],
    pub gpr_in: [u64; 16],
    pub gpr_out: [u64; 16],
    /// RIP, CS, RFLAGS, RSP, SS for IRETQ, the one instruction that loads them all at once and that TF does not stop.
    pub frame: [u64; 5],
    pub flags_out: u64,
    pub host_rsp: u64,
    /// Whether the system lets user code use RDFSBASE and friends; without it the bases are left alone.
    pub has_fsgsbase: u64,
    pub fs_in: u64,
    pub gs_in: u64,
    pub fs_out: u64,
    pub gs_out: u64,
    pub host_fs: u64,
    pub host_gs: u64,
    /// The XSAVE components to load and store.
    pub components: u64,
    /// The selector for DS and ES, 0 to leave them alone.
    pub data_selector: u64,
    /// The Rust function that signals end in.
    pub handler: u64,
    /// What it found: signal, and the processor's exception.
    pub signal: u64,
    pub rip_out: u64,
    pub trap: u64,
    pub error: u64,
    pub address: u64,
    pub host_mxcsr: u32,
    /// For the moment between a case and the host's own stack.
    pub stack: [u64; 16],
    pub stack_top: [u64; 2],
}

unsafe extern "C" {
    static lodge_oracle_blob: u8;
    static lodge_oracle_exit: u8;
    static lodge_oracle_signal: u8;
    static lodge_oracle_resume: u8;
    static lodge_oracle_gate: u8;
    static lodge_oracle_gate_return: u8;
}

/// The template, and addresses in its copy at [`BLOB`].
pub struct Blob;

impl Blob {
    pub fn template() -> *const u8 {
        &raw const lodge_oracle_blob
    }

    fn at(symbol: *const u8) -> u64 {
        BLOB + (symbol as u64 - Self::template() as u64)
    }

    /// `fn() -> u64`: runs the case in `Data`; 0 when it left by [`Blob::exit`], 1 by a signal.
    pub fn enter() -> u64 {
        BLOB
    }

    /// Where the jump behind the instruction goes.
    pub fn exit() -> u64 {
        Self::at(&raw const lodge_oracle_exit)
    }

    /// The signal handler.
    pub fn signal() -> u64 {
        Self::at(&raw const lodge_oracle_signal)
    }

    /// Where the Rust part of the handler jumps in the end.
    pub fn resume() -> u64 {
        Self::at(&raw const lodge_oracle_resume)
    }

    /// `fn(number, six arguments…) -> result`: the only place system calls may come from.
    pub fn gate() -> u64 {
        Self::at(&raw const lodge_oracle_gate)
    }

    /// The instruction pointer that the kernel sees in a call through the gate.
    pub fn gate_return() -> u64 {
        Self::at(&raw const lodge_oracle_gate_return)
    }
}

std::arch::global_asm!(
    r#"
    .pushsection .rodata.lodge_oracle, "a", @progbits
    .macro lodge_load register, index
        mov \register, qword ptr [rip + lodge_oracle_data + {gpr_in} + 8 * \index]
    .endm
    .macro lodge_save register, index
        mov qword ptr [rip + lodge_oracle_data + {gpr_out} + 8 * \index], \register
    .endm
    .macro lodge_bases fs, gs
        mov eax, fs
        test eax, eax
        je 1f
        xor eax, eax
        mov fs, eax
    1:  mov eax, gs
        test eax, eax
        je 2f
        xor eax, eax
        mov gs, eax
    2:  cmp qword ptr [rip + lodge_oracle_data + {has_fsgsbase}], 0
        je 3f
        mov rax, qword ptr [rip + lodge_oracle_data + \fs]
        wrfsbase rax
        mov rax, qword ptr [rip + lodge_oracle_data + \gs]
        wrgsbase rax
    3:
    .endm
    .macro lodge_note_bases
        cmp qword ptr [rip + lodge_oracle_data + {has_fsgsbase}], 0
        je 4f
        rdfsbase rax
        mov qword ptr [rip + lodge_oracle_data + {fs_out}], rax
        rdgsbase rax
        mov qword ptr [rip + lodge_oracle_data + {gs_out}], rax
    4:
    .endm

    .p2align 12
    .globl lodge_oracle_blob
lodge_oracle_blob:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov qword ptr [rip + lodge_oracle_data + {host_rsp}], rsp
    mov eax, dword ptr [rip + lodge_oracle_data + {components}]
    xor edx, edx
    xrstor64 [rip + lodge_oracle_data + {xsave_in}]
    mov eax, dword ptr [rip + lodge_oracle_data + {data_selector}]
    test eax, eax
    je 5f
    mov ds, eax
    mov es, eax
5:
    lodge_bases {fs_in}, {gs_in}
    lodge_load rax, 0
    lodge_load rcx, 1
    lodge_load rdx, 2
    lodge_load rbx, 3
    lodge_load rbp, 5
    lodge_load rsi, 6
    lodge_load rdi, 7
    lodge_load r8, 8
    lodge_load r9, 9
    lodge_load r10, 10
    lodge_load r11, 11
    lodge_load r12, 12
    lodge_load r13, 13
    lodge_load r14, 14
    lodge_load r15, 15
    lea rsp, [rip + lodge_oracle_data + {frame}]
    iretq

    .globl lodge_oracle_exit
lodge_oracle_exit:
    lodge_save rax, 0
    lodge_save rcx, 1
    lodge_save rdx, 2
    lodge_save rbx, 3
    lodge_save rsp, 4
    lodge_save rbp, 5
    lodge_save rsi, 6
    lodge_save rdi, 7
    lodge_save r8, 8
    lodge_save r9, 9
    lodge_save r10, 10
    lodge_save r11, 11
    lodge_save r12, 12
    lodge_save r13, 13
    lodge_save r14, 14
    lodge_save r15, 15
    lea rsp, [rip + lodge_oracle_data + {stack_top}]
    pushfq
    pop qword ptr [rip + lodge_oracle_data + {flags_out}]
    push 2
    popfq
    mov eax, dword ptr [rip + lodge_oracle_data + {components}]
    xor edx, edx
    xsave64 [rip + lodge_oracle_data + {xsave_out}]
    lodge_note_bases
    lodge_bases {host_fs}, {host_gs}
    fninit
    ldmxcsr [rip + lodge_oracle_data + {host_mxcsr}]
    xor eax, eax
    jmp 6f

    .globl lodge_oracle_resume
lodge_oracle_resume:
    mov eax, 1
6:  mov rsp, qword ptr [rip + lodge_oracle_data + {host_rsp}]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    cld
    ret

    .globl lodge_oracle_signal
lodge_oracle_signal:
    push 2
    popfq
    lodge_note_bases
    lodge_bases {host_fs}, {host_gs}
    jmp qword ptr [rip + lodge_oracle_data + {handler}]

    .globl lodge_oracle_gate
lodge_oracle_gate:
    mov rax, rdi
    mov rdi, rsi
    mov rsi, rdx
    mov rdx, rcx
    mov r10, r8
    mov r8, r9
    xor r9d, r9d
    syscall
    .globl lodge_oracle_gate_return
lodge_oracle_gate_return:
    ret

    .p2align 12
lodge_oracle_data:
    .popsection
    "#,
    xsave_in = const offset_of!(Data, xsave_in),
    xsave_out = const offset_of!(Data, xsave_out),
    gpr_in = const offset_of!(Data, gpr_in),
    gpr_out = const offset_of!(Data, gpr_out),
    frame = const offset_of!(Data, frame),
    flags_out = const offset_of!(Data, flags_out),
    host_rsp = const offset_of!(Data, host_rsp),
    has_fsgsbase = const offset_of!(Data, has_fsgsbase),
    fs_in = const offset_of!(Data, fs_in),
    gs_in = const offset_of!(Data, gs_in),
    fs_out = const offset_of!(Data, fs_out),
    gs_out = const offset_of!(Data, gs_out),
    host_fs = const offset_of!(Data, host_fs),
    host_gs = const offset_of!(Data, host_gs),
    components = const offset_of!(Data, components),
    data_selector = const offset_of!(Data, data_selector),
    handler = const offset_of!(Data, handler),
    host_mxcsr = const offset_of!(Data, host_mxcsr),
    stack_top = const offset_of!(Data, stack_top),
);
