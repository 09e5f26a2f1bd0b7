//! Which instructions may run on the host's processor: those that only compute, from registers and at most one
//! memory operand of at most 64 bytes, to registers or that operand.

use iced_x86::{Code, EncodingKind, Mnemonic};

/// What an instruction needs around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// General registers and flags only.
    Integer,
    /// Vector or MMX registers; MXCSR neither read nor written.
    Vector,
    /// As `Vector`, but MXCSR controls it and takes its exceptions.
    Float,
    /// x87 registers, control and status word.
    X87,
}

/// Whether `code` is in the list. It may still be refused for an operand that is not (AH with a REX prefix, say),
/// or because the host's processor lacks it.
pub fn listed(code: Code) -> bool {
    class(code).is_some()
}

pub(crate) fn class(code: Code) -> Option<Class> {
    let known = code.cpuid_features().iter().all(|&feature| crate::features::known(feature));
    let encoding = matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    if known && encoding { by_mnemonic(code.mnemonic()) } else { None }
}

#[rustfmt::skip]
fn by_mnemonic(mnemonic: Mnemonic) -> Option<Class> {
    use Mnemonic::*;
    Some(match mnemonic {
        Aesdec | Aesdeclast | Aesenc | Aesenclast | Aesimc | Aeskeygenassist | Andnpd | Andnps | Andpd |
        Andps | Blendpd | Blendps | Blendvpd | Blendvps | Extractps | Extrq | Gf2p8affineinvqb |
        Gf2p8affineqb | Gf2p8mulb | Insertps | Insertq | Lddqu | Movapd | Movaps | Movd | Movddup | Movdq2q
        | Movdqa | Movdqu | Movhlps | Movhpd | Movhps | Movlhps | Movlpd | Movlps | Movmskpd | Movmskps |
        Movq | Movq2dq | Movsd | Movshdup | Movsldup | Movss | Movupd | Movups | Mpsadbw | Orpd | Orps |
        Pabsb | Pabsd | Pabsw | Packssdw | Packsswb | Packusdw | Packuswb | Paddb | Paddd | Paddq | Paddsb |
        Paddsw | Paddusb | Paddusw | Paddw | Palignr | Pand | Pandn | Pavgb | Pavgw | Pblendvb | Pblendw |
        Pclmulqdq | Pcmpeqb | Pcmpeqd | Pcmpeqq | Pcmpeqw | Pcmpestri | Pcmpestri64 | Pcmpestrm |
        Pcmpestrm64 | Pcmpgtb | Pcmpgtd | Pcmpgtq | Pcmpgtw | Pcmpistri | Pcmpistrm | Pextrb | Pextrd |
        Pextrq | Pextrw | Phaddd | Phaddsw | Phaddw | Phminposuw | Phsubd | Phsubsw | Phsubw | Pinsrb |
        Pinsrd | Pinsrq | Pinsrw | Pmaddubsw | Pmaddwd | Pmaxsb | Pmaxsd | Pmaxsw | Pmaxub | Pmaxud | Pmaxuw
        | Pminsb | Pminsd | Pminsw | Pminub | Pminud | Pminuw | Pmovmskb | Pmovsxbd | Pmovsxbq | Pmovsxbw |
        Pmovsxdq | Pmovsxwd | Pmovsxwq | Pmovzxbd | Pmovzxbq | Pmovzxbw | Pmovzxdq | Pmovzxwd | Pmovzxwq |
        Pmuldq | Pmulhrsw | Pmulhuw | Pmulhw | Pmulld | Pmullw | Pmuludq | Por | Psadbw | Pshufb | Pshufd |
        Pshufhw | Pshuflw | Pshufw | Psignb | Psignd | Psignw | Pslld | Pslldq | Psllq | Psllw | Psrad |
        Psraw | Psrld | Psrldq | Psrlq | Psrlw | Psubb | Psubd | Psubq | Psubsb | Psubsw | Psubusb | Psubusw
        | Psubw | Ptest | Punpckhbw | Punpckhdq | Punpckhqdq | Punpckhwd | Punpcklbw | Punpckldq |
        Punpcklqdq | Punpcklwd | Pxor | Sha1msg1 | Sha1msg2 | Sha1nexte | Sha1rnds4 | Sha256msg1 |
        Sha256msg2 | Sha256rnds2 | Shufpd | Shufps | Unpckhpd | Unpckhps | Unpcklpd | Unpcklps | Xorpd |
        Xorps | Vaesdec | Vaesdeclast | Vaesenc | Vaesenclast | Vaesimc | Vaeskeygenassist | Vandnpd |
        Vandnps | Vandpd | Vandps | Vblendpd | Vblendps | Vblendvpd | Vblendvps | Vextractps |
        Vgf2p8affineinvqb | Vgf2p8affineqb | Vgf2p8mulb | Vinsertps | Vlddqu | Vmovapd | Vmovaps | Vmovd |
        Vmovddup | Vmovdqa | Vmovdqu | Vmovhlps | Vmovhpd | Vmovhps | Vmovlhps | Vmovlpd | Vmovlps |
        Vmovmskpd | Vmovmskps | Vmovq | Vmovsd | Vmovshdup | Vmovsldup | Vmovss | Vmovupd | Vmovups |
        Vmpsadbw | Vorpd | Vorps | Vpabsb | Vpabsd | Vpabsw | Vpackssdw | Vpacksswb | Vpackusdw | Vpackuswb
        | Vpaddb | Vpaddd | Vpaddq | Vpaddsb | Vpaddsw | Vpaddusb | Vpaddusw | Vpaddw | Vpalignr | Vpand |
        Vpandn | Vpavgb | Vpavgw | Vpblendvb | Vpblendw | Vpclmulqdq | Vpcmpeqb | Vpcmpeqd | Vpcmpeqq |
        Vpcmpeqw | Vpcmpestri | Vpcmpestri64 | Vpcmpestrm | Vpcmpestrm64 | Vpcmpgtb | Vpcmpgtd | Vpcmpgtq |
        Vpcmpgtw | Vpcmpistri | Vpcmpistrm | Vpextrb | Vpextrd | Vpextrq | Vpextrw | Vphaddd | Vphaddsw |
        Vphaddw | Vphminposuw | Vphsubd | Vphsubsw | Vphsubw | Vpinsrb | Vpinsrd | Vpinsrq | Vpinsrw |
        Vpmaddubsw | Vpmaddwd | Vpmaxsb | Vpmaxsd | Vpmaxsw | Vpmaxub | Vpmaxud | Vpmaxuw | Vpminsb |
        Vpminsd | Vpminsw | Vpminub | Vpminud | Vpminuw | Vpmovmskb | Vpmovsxbd | Vpmovsxbq | Vpmovsxbw |
        Vpmovsxdq | Vpmovsxwd | Vpmovsxwq | Vpmovzxbd | Vpmovzxbq | Vpmovzxbw | Vpmovzxdq | Vpmovzxwd |
        Vpmovzxwq | Vpmuldq | Vpmulhrsw | Vpmulhuw | Vpmulhw | Vpmulld | Vpmullw | Vpmuludq | Vpor | Vpsadbw
        | Vpshufb | Vpshufd | Vpshufhw | Vpshuflw | Vpsignb | Vpsignd | Vpsignw | Vpslld | Vpslldq | Vpsllq
        | Vpsllw | Vpsrad | Vpsraw | Vpsrld | Vpsrldq | Vpsrlq | Vpsrlw | Vpsubb | Vpsubd | Vpsubq | Vpsubsb
        | Vpsubsw | Vpsubusb | Vpsubusw | Vpsubw | Vptest | Vpunpckhbw | Vpunpckhdq | Vpunpckhqdq |
        Vpunpckhwd | Vpunpcklbw | Vpunpckldq | Vpunpcklqdq | Vpunpcklwd | Vpxor | Vshufpd | Vshufps |
        Vunpckhpd | Vunpckhps | Vunpcklpd | Vunpcklps | Vxorpd | Vxorps | Vbroadcastf128 | Vbroadcasti128 |
        Vbroadcastsd | Vbroadcastss | Vextractf128 | Vextracti128 | Vinsertf128 | Vinserti128 | Vmaskmovpd |
        Vmaskmovps | Vpblendd | Vpbroadcastb | Vpbroadcastd | Vpbroadcastq | Vpbroadcastw | Vperm2f128 |
        Vperm2i128 | Vpermd | Vpermilpd | Vpermilps | Vpermpd | Vpermps | Vpermq | Vpmaskmovd | Vpmaskmovq |
        Vpsllvd | Vpsllvq | Vpsravd | Vpsrlvd | Vpsrlvq | Vtestpd | Vtestps => Class::Vector,
        Adcx | Adox | Andn | Bextr | Blsi | Blsmsk | Blsr | Bzhi | Crc32 | Lzcnt | Mulx | Pdep | Pext |
        Popcnt | Rorx | Sarx | Shlx | Shrx | Tzcnt => Class::Integer,
        Addpd | Addps | Addsd | Addss | Addsubpd | Addsubps | Cmppd | Cmpps | Cmpsd | Cmpss | Comisd |
        Comiss | Cvtdq2pd | Cvtdq2ps | Cvtpd2dq | Cvtpd2pi | Cvtpd2ps | Cvtpi2pd | Cvtpi2ps | Cvtps2dq |
        Cvtps2pd | Cvtps2pi | Cvtsd2si | Cvtsd2ss | Cvtsi2sd | Cvtsi2ss | Cvtss2sd | Cvtss2si | Cvttpd2dq |
        Cvttpd2pi | Cvttps2dq | Cvttps2pi | Cvttsd2si | Cvttss2si | Divpd | Divps | Divsd | Divss | Dppd |
        Dpps | Haddpd | Haddps | Hsubpd | Hsubps | Maxpd | Maxps | Maxsd | Maxss | Minpd | Minps | Minsd |
        Minss | Mulpd | Mulps | Mulsd | Mulss | Rcpps | Rcpss | Roundpd | Roundps | Roundsd | Roundss |
        Rsqrtps | Rsqrtss | Sqrtpd | Sqrtps | Sqrtsd | Sqrtss | Subpd | Subps | Subsd | Subss | Ucomisd |
        Ucomiss | Vaddpd | Vaddps | Vaddsd | Vaddss | Vaddsubpd | Vaddsubps | Vcmppd | Vcmpps | Vcmpsd |
        Vcmpss | Vcomisd | Vcomiss | Vcvtdq2pd | Vcvtdq2ps | Vcvtpd2dq | Vcvtpd2ps | Vcvtph2ps | Vcvtps2dq |
        Vcvtps2pd | Vcvtps2ph | Vcvtsd2si | Vcvtsd2ss | Vcvtsi2sd | Vcvtsi2ss | Vcvtss2sd | Vcvtss2si |
        Vcvttpd2dq | Vcvttps2dq | Vcvttsd2si | Vcvttss2si | Vdivpd | Vdivps | Vdivsd | Vdivss | Vdppd |
        Vdpps | Vfmadd132pd | Vfmadd132ps | Vfmadd132sd | Vfmadd132ss | Vfmadd213pd | Vfmadd213ps |
        Vfmadd213sd | Vfmadd213ss | Vfmadd231pd | Vfmadd231ps | Vfmadd231sd | Vfmadd231ss | Vfmaddsub132pd |
        Vfmaddsub132ps | Vfmaddsub213pd | Vfmaddsub213ps | Vfmaddsub231pd | Vfmaddsub231ps | Vfmsub132pd |
        Vfmsub132ps | Vfmsub132sd | Vfmsub132ss | Vfmsub213pd | Vfmsub213ps | Vfmsub213sd | Vfmsub213ss |
        Vfmsub231pd | Vfmsub231ps | Vfmsub231sd | Vfmsub231ss | Vfmsubadd132pd | Vfmsubadd132ps |
        Vfmsubadd213pd | Vfmsubadd213ps | Vfmsubadd231pd | Vfmsubadd231ps | Vfnmadd132pd | Vfnmadd132ps |
        Vfnmadd132sd | Vfnmadd132ss | Vfnmadd213pd | Vfnmadd213ps | Vfnmadd213sd | Vfnmadd213ss |
        Vfnmadd231pd | Vfnmadd231ps | Vfnmadd231sd | Vfnmadd231ss | Vfnmsub132pd | Vfnmsub132ps |
        Vfnmsub132sd | Vfnmsub132ss | Vfnmsub213pd | Vfnmsub213ps | Vfnmsub213sd | Vfnmsub213ss |
        Vfnmsub231pd | Vfnmsub231ps | Vfnmsub231sd | Vfnmsub231ss | Vhaddpd | Vhaddps | Vhsubpd | Vhsubps |
        Vmaxpd | Vmaxps | Vmaxsd | Vmaxss | Vminpd | Vminps | Vminsd | Vminss | Vmulpd | Vmulps | Vmulsd |
        Vmulss | Vrcpps | Vrcpss | Vroundpd | Vroundps | Vroundsd | Vroundss | Vrsqrtps | Vrsqrtss | Vsqrtpd
        | Vsqrtps | Vsqrtsd | Vsqrtss | Vsubpd | Vsubps | Vsubsd | Vsubss | Vucomisd | Vucomiss => Class::Float,
        F2xm1 | Fabs | Fadd | Faddp | Fbld | Fbstp | Fchs | Fcmovb | Fcmovbe | Fcmove | Fcmovnb | Fcmovnbe |
        Fcmovne | Fcmovnu | Fcmovu | Fcom | Fcomi | Fcomip | Fcomp | Fcompp | Fcos | Fdecstp | Fdiv | Fdivp |
        Fdivr | Fdivrp | Ffree | Ffreep | Fiadd | Ficom | Ficomp | Fidiv | Fidivr | Fild | Fimul | Fincstp | Fist |
        Fistp | Fisttp | Fisub | Fisubr | Fld | Fld1 | Fldl2e | Fldl2t | Fldlg2 | Fldln2 | Fldpi | Fldz | Fmul |
        Fmulp | Fpatan | Fprem | Fprem1 | Fptan | Frndint | Fscale | Fsin | Fsincos | Fsqrt | Fst | Fstp | Fsub |
        Fsubp | Fsubr | Fsubrp | Ftst | Fucom | Fucomi | Fucomip | Fucomp | Fucompp | Fxam | Fxch | Fxtract |
        Fyl2x | Fyl2xp1 => Class::X87,
        _ => return None,
    })
}
