//! Who signed it: keyrings, and OpenPGP signatures checked against them (RFC 9580, RFC 4880).
//!
//! A signature counts when a key of the keyring made it, with a hash that is still sound, and that key was neither
//! revoked nor expired. One that counts is enough, as in apt: archives are signed with the keys of several releases.

use std::io::{Cursor, Read};
use std::path::Path;

use pgp::armor::Dearmor;
use pgp::composed::{
    CleartextSignedMessage, Deserializable, DetachedSignature, SignedPublicKey, SignedPublicSubKey,
};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{Packet, PacketParser, Signature, SignatureType};
use pgp::types::{KeyDetails, Tag};

const ARMOUR: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----";
/// Keyrings are read whole; the largest in use are below 1 MB.
const LARGEST_KEYRING: u64 = 16 << 20;

/// Public keys that are trusted to sign an archive.
#[derive(Debug, Default, Clone)]
pub struct Keyring {
    keys: Vec<SignedPublicKey>,
}

/// Why no signature counts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// The text is not an OpenPGP message.
    #[error("it is not a signed OpenPGP text")]
    Malformed,
    /// None of the keys that signed is in the keyring. Key IDs, hexadecimal.
    #[error("it is signed by {} and the keyring has none of these keys", keys.join(", "))]
    UnknownKey {
        /// Who signed.
        keys: Vec<String>,
    },
    /// A known key's signature does not fit the text.
    #[error("the signature does not fit the text")]
    Bad,
    /// The key that signed may not be used any more, or the signature is too weak.
    #[error("its signature does not count: {0}")]
    Rejected(&'static str),
}

impl Keyring {
    /// Adds the keys of a file in binary or ASCII form. Keys of kinds that are not known are left out.
    pub fn add_file(&mut self, path: &Path) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(LARGEST_KEYRING).read_to_end(&mut bytes)?;
        self.add(&bytes);
        Ok(())
    }

    /// Adds the keys in `bytes`, binary or ASCII (several armoured blocks in a row, too).
    pub fn add(&mut self, bytes: &[u8]) {
        match std::str::from_utf8(bytes).ok().filter(|text| text.contains(ARMOUR)) {
            Some(text) => {
                for block in text.split(ARMOUR).skip(1) {
                    self.add_block(format!("{ARMOUR}{block}").as_bytes());
                }
            }
            None => self.add_block(bytes),
        }
    }

    fn add_block(&mut self, bytes: &[u8]) {
        if bytes.starts_with(b"-") {
            let mut binary = Vec::new();
            if Dearmor::new(Cursor::new(bytes)).read_to_end(&mut binary).is_ok() {
                self.add_packets(&binary);
            }
        } else {
            self.add_packets(bytes);
        }
    }

    fn add_packets(&mut self, bytes: &[u8]) {
        // GnuPG leaves its own notes on trust between the packets of a key, as in Ubuntu's keyring.
        let packets = PacketParser::new(bytes).filter(|packet| !matches!(packet, Ok(Packet::Trust(_))));
        self.keys.extend(SignedPublicKey::from_packets(packets.peekable()).flatten());
    }

    /// Keeps only keys of which the primary key or a subkey ends in one of the fingerprints (upper case).
    pub fn retain(&mut self, fingerprints: &[String]) {
        self.keys.retain(|key| {
            let subkeys = key.public_subkeys.iter().map(|subkey| subkey.fingerprint());
            let mut prints = subkeys.chain([key.fingerprint()]).map(|print| format!("{print:X}"));
            prints
                .any(|print| fingerprints.iter().any(|wanted| wanted.len() >= 16 && print.ends_with(wanted)))
        });
    }

    /// Whether there is no key at all.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Checks a text with its signature inside (`InRelease`), and gives back exactly what was signed.
    /// `now` is in seconds since 1970.
    pub fn verify_cleartext(&self, message: &str, now: u64) -> Result<String, SignatureError> {
        let (message, _) =
            CleartextSignedMessage::from_string(message).map_err(|_| SignatureError::Malformed)?;
        let text = message.signed_text();
        self.any(message.signatures(), text.as_bytes(), now)?;
        Ok(text)
    }

    /// Checks `data` against the signatures of a separate file (`Release.gpg`), ASCII or binary.
    pub fn verify_detached(&self, data: &[u8], signatures: &[u8], now: u64) -> Result<(), SignatureError> {
        let (found, _) = DetachedSignature::from_reader_many(Cursor::new(signatures))
            .map_err(|_| SignatureError::Malformed)?;
        let found: Vec<Signature> = found.flatten().map(|one| one.signature).collect();
        self.any(&found, data, now)
    }

    fn any(&self, signatures: &[Signature], data: &[u8], now: u64) -> Result<(), SignatureError> {
        let mut failure = None;
        for signature in signatures {
            match self.one(signature, data, now) {
                Ok(()) => return Ok(()),
                // What went wrong with a known key says more than that another one is unknown.
                Err(SignatureError::UnknownKey { .. }) => {}
                Err(error) => failure = Some(error),
            }
        }
        let issuers = |signature: &Signature| match signature.issuer_key_id()[..] {
            [] => "an unnamed key".to_owned(),
            [id, ..] => id.to_string().to_ascii_uppercase(),
        };
        match failure {
            Some(error) => Err(error),
            None if signatures.is_empty() => Err(SignatureError::Malformed),
            None => Err(SignatureError::UnknownKey { keys: signatures.iter().map(issuers).collect() }),
        }
    }

    fn one(&self, signature: &Signature, data: &[u8], now: u64) -> Result<(), SignatureError> {
        if !matches!(signature.typ(), Some(SignatureType::Binary | SignatureType::Text)) {
            return Err(SignatureError::Rejected("it is no signature of a document"));
        }
        let mut known = false;
        for key in &self.keys {
            let ids = signature.issuer_key_id();
            let prints = signature.issuer_fingerprint();
            let made_by = |id: pgp::types::KeyId, print: pgp::types::Fingerprint| {
                ids.contains(&&id) || prints.contains(&&print)
            };
            let fits = if made_by(key.legacy_key_id(), key.fingerprint()) {
                known = true;
                signature.verify(&key.primary_key, data).is_ok()
            } else if let Some(subkey) =
                key.public_subkeys.iter().find(|subkey| made_by(subkey.legacy_key_id(), subkey.fingerprint()))
            {
                known = true;
                let fits = signature.verify(&subkey.key, data).is_ok();
                if fits {
                    subkey_may_sign(key, subkey, now)?;
                }
                fits
            } else {
                false
            };
            if fits {
                key_is_valid(key, now)?;
                return signature_is_sound(signature, now);
            }
        }
        Err(if known { SignatureError::Bad } else { SignatureError::UnknownKey { keys: Vec::new() } })
    }
}

fn is_sound(signature: &Signature) -> bool {
    use HashAlgorithm::{Sha3_256, Sha3_512, Sha224, Sha256, Sha384, Sha512};
    matches!(signature.hash_alg(), Some(Sha224 | Sha256 | Sha384 | Sha512 | Sha3_256 | Sha3_512))
}

fn signature_is_sound(signature: &Signature, now: u64) -> Result<(), SignatureError> {
    if !is_sound(signature) {
        return Err(SignatureError::Rejected("its hash is too weak"));
    }
    match expired(signature.created(), signature.signature_expiration_time(), now) {
        true => Err(SignatureError::Rejected("the signature has expired")),
        false => Ok(()),
    }
}

/// Whether a time `life` after `from` has passed; a life of 0 never ends.
fn expired(from: Option<pgp::types::Timestamp>, life: Option<pgp::types::Duration>, now: u64) -> bool {
    let life = life.map_or(0, |life| u64::from(life.as_secs()));
    let from = from.map_or(0, |from| u64::from(from.as_secs()));
    life != 0 && from + life <= now
}

/// Checks the primary key against what it says of itself: revoked? expired? The newest statement counts.
fn key_is_valid(key: &SignedPublicKey, now: u64) -> Result<(), SignatureError> {
    let primary = &key.primary_key;
    if key.details.revocation_signatures.iter().any(|one| one.verify_key(primary).is_ok()) {
        return Err(SignatureError::Rejected("the key was revoked"));
    }
    let direct = key.details.direct_signatures.iter().filter(|one| one.verify_key(primary).is_ok());
    let users = key.details.users.iter().flat_map(|user| {
        let own = user.signatures.iter().filter(|one| one.typ() != Some(SignatureType::CertRevocation));
        own.filter(|one| one.verify_certification(primary, Tag::UserId, &user.id).is_ok())
    });
    let newest = direct.chain(users).max_by_key(|one| one.created().map(|time| time.as_secs()));
    let Some(newest) = newest else {
        return Err(SignatureError::Rejected("the key does not vouch for itself"));
    };
    match expired(Some(primary.created_at()), newest.key_expiration_time(), now) {
        true => Err(SignatureError::Rejected("the key has expired")),
        false => Ok(()),
    }
}

/// Checks that a subkey belongs to its primary key, may sign, and was neither revoked nor expired.
fn subkey_may_sign(
    key: &SignedPublicKey,
    subkey: &SignedPublicSubKey,
    now: u64,
) -> Result<(), SignatureError> {
    let primary = &key.primary_key;
    let own = subkey.signatures.iter().filter(|one| one.verify_subkey_binding(primary, &subkey.key).is_ok());
    let (revocations, bindings): (Vec<_>, Vec<_>) =
        own.partition(|one| one.typ() == Some(SignatureType::SubkeyRevocation));
    if !revocations.is_empty() {
        return Err(SignatureError::Rejected("the subkey was revoked"));
    }
    let newest = bindings.into_iter().max_by_key(|one| one.created().map(|time| time.as_secs()));
    let Some(binding) = newest else {
        return Err(SignatureError::Rejected("the subkey does not belong to its key"));
    };
    // The subkey has to claim the primary key as well, or anyone's signing key could be adopted.
    let claimed = binding
        .embedded_signature()
        .is_some_and(|back| back.verify_primary_key_binding(&subkey.key, primary).is_ok());
    if !binding.key_flags().sign() || !claimed {
        return Err(SignatureError::Rejected("the subkey is not for signing"));
    }
    match expired(Some(subkey.created_at()), binding.key_expiration_time(), now) {
        true => Err(SignatureError::Rejected("the subkey has expired")),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgp::composed::{
        EncryptionCaps, KeyType, SecretKeyParamsBuilder, SignedSecretKey, SubkeyParamsBuilder,
    };
    use pgp::packet::{SignatureConfig, Subpacket, SubpacketData};
    use pgp::types::{Duration, Password, SigningKey, Timestamp};

    const DAY: u64 = 24 * 3600;

    fn key(subkey_signs: bool) -> SignedSecretKey {
        let mut subkey = SubkeyParamsBuilder::default();
        match subkey_signs {
            true => subkey.key_type(KeyType::Ed25519Legacy).can_sign(true),
            false => subkey
                .key_type(KeyType::ECDH(pgp::crypto::ecc_curve::ECCCurve::Curve25519Legacy))
                .can_encrypt(EncryptionCaps::All),
        };
        let mut params = SecretKeyParamsBuilder::default();
        params.key_type(KeyType::Ed25519Legacy).can_sign(true).subkey(subkey.build().unwrap());
        params.primary_user_id("test <test@example.org>".into());
        params.build().unwrap().generate(rand::thread_rng()).unwrap()
    }

    fn keyring(key: &SignedSecretKey) -> Keyring {
        Keyring { keys: vec![key.to_public_key()] }
    }

    fn config(typ: SignatureType, key: &impl SigningKey, more: Vec<SubpacketData>) -> SignatureConfig {
        let mut config = SignatureConfig::v4(typ, key.algorithm(), HashAlgorithm::Sha256);
        let usual = [
            SubpacketData::SignatureCreationTime(Timestamp::now()),
            SubpacketData::IssuerFingerprint(key.fingerprint()),
        ];
        config.hashed_subpackets =
            usual.into_iter().chain(more).map(|data| Subpacket::regular(data).unwrap()).collect();
        config
    }

    fn sign(key: &impl SigningKey, more: Vec<SubpacketData>) -> Signature {
        config(SignatureType::Binary, key, more).sign(key, &Password::empty(), &b"text"[..]).unwrap()
    }

    fn now() -> u64 {
        u64::from(Timestamp::now().as_secs())
    }

    #[test]
    fn primary_key_and_subkey_may_both_sign() {
        let key = key(true);
        let ring = keyring(&key);
        let by_primary = sign(&key.primary_key, vec![]);
        let by_subkey = sign(&key.secret_subkeys[0].key, vec![]);
        for signature in [&by_primary, &by_subkey] {
            assert_eq!(ring.any(std::slice::from_ref(signature), b"text", now()), Ok(()));
            assert_eq!(ring.any(std::slice::from_ref(signature), b"test", now()), Err(SignatureError::Bad));
        }
        let stranger = sign(&self::key(true).primary_key, vec![]);
        // One that counts is enough, wherever it is.
        assert_eq!(ring.any(&[stranger.clone(), by_subkey], b"text", now()), Ok(()));
        assert!(matches!(ring.any(&[stranger], b"text", now()), Err(SignatureError::UnknownKey { .. })));
        assert_eq!(ring.any(&[], b"text", now()), Err(SignatureError::Malformed));
    }

    #[test]
    fn what_has_expired_does_not_count() {
        let mut key = key(true);
        let short =
            sign(&key.primary_key, vec![SubpacketData::SignatureExpirationTime(Duration::from_secs(60))]);
        assert_eq!(keyring(&key).any(std::slice::from_ref(&short), b"text", now()), Ok(()));
        let late = keyring(&key).any(&[short], b"text", now() + DAY);
        assert_eq!(late, Err(SignatureError::Rejected("the signature has expired")));

        // A self-signature says how long the key lives.
        let user = key.details.users[0].id.clone();
        let life = SubpacketData::KeyExpirationTime(Duration::from_secs(3600));
        let own = config(SignatureType::CertPositive, &key.primary_key, vec![life]);
        let public = key.primary_key.public_key();
        let own =
            own.sign_certification(&key.primary_key, public, &Password::empty(), Tag::UserId, &user).unwrap();
        key.details.users[0].signatures = vec![own];
        for signature in [sign(&key.primary_key, vec![]), sign(&key.secret_subkeys[0].key, vec![])] {
            assert_eq!(keyring(&key).any(std::slice::from_ref(&signature), b"text", now()), Ok(()));
            let late = keyring(&key).any(&[signature], b"text", now() + DAY);
            assert_eq!(late, Err(SignatureError::Rejected("the key has expired")));
        }
    }

    #[test]
    fn a_revoked_key_does_not_count() {
        let mut key = key(true);
        let revocation = config(SignatureType::KeyRevocation, &key.primary_key, vec![]);
        let public = key.primary_key.public_key();
        let revocation = revocation.sign_key(&key.primary_key, &Password::empty(), public).unwrap();
        key.details.revocation_signatures.push(revocation);
        let signature = sign(&key.secret_subkeys[0].key, vec![]);
        let refused = Err(SignatureError::Rejected("the key was revoked"));
        assert_eq!(keyring(&key).any(&[signature], b"text", now()), refused);
    }

    #[test]
    fn a_foreign_subkey_cannot_be_adopted() {
        // The attacker's own subkey, put under the trusted key: its binding is not by that key.
        let (mut trusted, attacker) = (key(false), key(true));
        trusted.secret_subkeys.extend(attacker.secret_subkeys.clone());
        let signature = sign(&attacker.secret_subkeys[0].key, vec![]);
        let refused = Err(SignatureError::Rejected("the subkey does not belong to its key"));
        assert_eq!(keyring(&trusted).any(&[signature], b"text", now()), refused);
    }

    #[test]
    fn keyrings_hold_several_keys_in_either_form() {
        use pgp::ser::Serialize;
        let keys = [key(true), key(false)].map(|key| key.to_public_key());
        let binary: Vec<u8> = keys.iter().flat_map(|key| key.to_bytes().unwrap()).collect();
        let mut noted = Vec::new();
        for packet in PacketParser::new(&binary[..]) {
            packet.unwrap().to_writer(&mut noted).unwrap();
            noted.extend_from_slice(&[0xB0, 2, 0, 3]); // A trust packet of two bytes.
        }
        let armour: String = keys.iter().map(|key| key.to_armored_string(None.into()).unwrap()).collect();
        for bytes in [&binary[..], &noted, armour.as_bytes()] {
            let mut ring = Keyring::default();
            ring.add(bytes);
            assert_eq!(ring.keys, keys);
            let print = format!("{:X}", keys[1].public_subkeys[0].fingerprint());
            ring.retain(&[print]);
            assert_eq!(ring.keys, keys[1..]);
            ring.retain(&["AB".to_owned()]);
            assert!(ring.is_empty());
        }
        let mut ring = Keyring::default();
        for bytes in [&b""[..], b"garbage", &binary[..50], &[0x99, 0xFF, 0xFF]] {
            ring.add(bytes);
        }
        assert!(ring.is_empty());
    }
}
