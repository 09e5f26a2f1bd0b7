//! What is listed and what is not, over all instructions that the decoder knows.

use iced_x86::{Code, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, Mnemonic};

fn listed_codes() -> impl Iterator<Item = Code> {
    Code::values().filter(|&code| native::listed(code))
}

#[test]
fn nothing_but_compute_is_listed() {
    for code in listed_codes() {
        assert!(!code.is_privileged(), "{code:?}");
        assert!(!code.is_stack_instruction(), "{code:?}");
        assert!(!code.is_save_restore_instruction(), "{code:?}");
        assert!(!code.is_string_instruction(), "{code:?}");
        assert_eq!(code.flow_control(), FlowControl::Next, "{code:?}");
        assert!(matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX), "{code:?}");
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(&instruction);
        assert!(info.used_memory().len() <= 1, "{code:?} touches memory twice");
    }
}

#[test]
fn what_the_interpreter_does_itself_is_not_listed() {
    use Mnemonic::*;
    let own = [
        Ldmxcsr,
        Stmxcsr,
        Vldmxcsr,
        Vstmxcsr,
        Fldenv,
        Fnstenv,
        Frstor,
        Fnsave,
        Fxrstor,
        Fxsave,
        Fxrstor64,
        Fxsave64,
        Xrstor,
        Xsave,
        Xrstors,
        Xsaves,
        Xsavec,
        Xsaveopt,
        Fldcw,
        Fnstcw,
        Fnstsw,
        Fninit,
        Fnclex,
        Wait,
        Emms,
        Vzeroall,
        Vzeroupper,
        Maskmovq,
        Maskmovdqu,
        Vmaskmovdqu,
        Vgatherdps,
        Vpgatherdd,
        Vgatherqpd,
        Vpgatherqq,
        Div,
        Idiv,
        Cpuid,
        Rdtsc,
        Syscall,
        Int,
        Int3,
        Call,
        Ret,
        Jmp,
        Push,
        Pop,
        Mov,
        Xgetbv,
        Wrfsbase,
        Rdrand,
        Cmpxchg16b,
        Clflush,
        Prefetcht0,
        Monitor,
        Mwait,
        Hlt,
        In,
        Out,
        Iretq,
        Lgdt,
        Wrmsr,
        Movntps,
        Movntdq,
        Movsb,
        Cmpsb,
        Loop,
        Enter,
        Leave,
        Popfq,
        Bound,
        Into,
    ];
    for code in Code::values().filter(|code| own.contains(&code.mnemonic())) {
        assert!(!native::listed(code), "{code:?}");
    }
    // Two mnemonics mean a string instruction as well.
    assert!(!native::listed(Code::Movsd_m32_m32) && native::listed(Code::Movsd_xmm_xmmm64));
    assert!(!native::listed(Code::Cmpsd_m32_m32) && native::listed(Code::Cmpsd_xmm_xmmm64_imm8));
}
