//! SSE and AVX arithmetic under a guest's MXCSR that leaves exceptions unmasked.
//!
//! The host always runs with all exceptions masked. What the processor would have done is worked out from the flags
//! of such a run (SDM vol. 1, 11.5.2 and 11.5.3): the pre-computation exceptions of all elements come first; if one
//! of them is unmasked, no post-computation flag is set. No exception writes a result.
//!
//! Three things are lost. An unmasked underflow sets PE if its result, taken with an unbounded exponent, is inexact;
//! here PE is also set if only denormalizing it was. And DPPS and DPPD may stop after their first stage; here the
//! flags of all stages are set. Only handlers that look at flags beside the one they handle could tell. And
//! VCVTPS2PH, which ignores flush to zero, does not report an unmasked underflow with an exact result.

/// Exception flags of MXCSR.
pub(crate) const FLAGS: u32 = 0x3f;
/// Invalid operation, denormal operand, division by zero.
const PRE: u32 = 0b111;
/// Underflow.
pub(crate) const UE: u32 = 1 << 4;
/// All masks.
pub(crate) const MASKS: u32 = 0x1f80;
/// Flush to zero.
pub(crate) const FTZ: u32 = 1 << 15;

/// The MXCSR to run with for the results and flags of a guest with `mxcsr`: nothing unmasked, no flag set. Flush to
/// zero has no effect while underflow is unmasked.
pub(crate) fn masked(mxcsr: u32) -> u32 {
    let ftz = if unmasked(mxcsr) & UE != 0 { FTZ } else { 0 };
    (mxcsr | MASKS) & !FLAGS & !ftz
}

/// The exceptions that `mxcsr` does not mask, at the place of their flags.
pub(crate) fn unmasked(mxcsr: u32) -> u32 {
    !(mxcsr >> 7) & FLAGS
}

/// The flags to set, and whether one of them is an exception to raise, after `raised` in an instruction.
pub(crate) fn judge(mxcsr: u32, raised: u32) -> (u32, bool) {
    let unmasked = unmasked(mxcsr);
    if raised & PRE & unmasked != 0 {
        return (raised & PRE, true);
    }
    (raised, raised & unmasked != 0)
}
