BEGIN TRANSACTION;
CREATE TABLE blobs (
	digest VARCHAR NOT NULL, 
	summary JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "blobs" VALUES('sha256:46b2683fc861976985e057d1fc62a9b4109fa2eba46ca21917b0adabd6b7a2a3','{"peft_type": "LORA", "rank": 1, "target_modules": ["q_proj"], "size_bytes": 1038, "base_model": "tiny"}',1.79531952832643890375e+09);
INSERT INTO "blobs" VALUES('sha256:b7fa8cf490323dce54a5c9119b3b58ef4c3f879b21f6c2d69caa83e729d00728','{"peft_type": "LORA", "rank": 1, "target_modules": ["q_proj"], "size_bytes": 1038, "base_model": "tiny"}',1.79531952833394455905e+09);
INSERT INTO "blobs" VALUES('sha256:80f6a5f60c66b0159d773a6151ddfaf158ca989a3089a68ecd37ba6cfa049580','{"peft_type": "LORA", "rank": 1, "target_modules": ["q_proj"], "size_bytes": 1038, "base_model": "tiny"}',1.79531952834742546077e+09);
CREATE TABLE names (
	name VARCHAR NOT NULL, 
	current_version INTEGER, 
	last_version INTEGER NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "names" VALUES('a',2,2);
INSERT INTO "names" VALUES('b',1,1);
INSERT INTO "names" VALUES('gone',NULL,2);
CREATE TABLE versions (
	name VARCHAR NOT NULL, 
	version INTEGER NOT NULL, 
	digest VARCHAR NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (name, version), 
	FOREIGN KEY(name) REFERENCES names (name), 
	FOREIGN KEY(digest) REFERENCES blobs (digest)
);
INSERT INTO "versions" VALUES('a',1,'sha256:46b2683fc861976985e057d1fc62a9b4109fa2eba46ca21917b0adabd6b7a2a3',1.79531952832643890375e+09);
INSERT INTO "versions" VALUES('a',2,'sha256:b7fa8cf490323dce54a5c9119b3b58ef4c3f879b21f6c2d69caa83e729d00728',1.79531952833394455905e+09);
INSERT INTO "versions" VALUES('b',1,'sha256:46b2683fc861976985e057d1fc62a9b4109fa2eba46ca21917b0adabd6b7a2a3',1.79531952834301805491e+09);
CREATE INDEX ix_versions_digest ON versions (digest);
COMMIT;
PRAGMA user_version = 1;
