BEGIN TRANSACTION;
CREATE TABLE meta (
	"key" VARCHAR NOT NULL, 
	value VARCHAR NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "meta" VALUES('schema_version','2');
INSERT INTO "meta" VALUES('store_id','0123456789abcdef0123456789abcdef');
INSERT INTO "meta" VALUES('changes','7');
CREATE TABLE blobs (
	digest VARCHAR NOT NULL, 
	summary JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "blobs" VALUES('sha256:46b2683fc861976985e057d1fc62a9b4109fa2eba46ca21917b0adabd6b7a2a3','{"peft_type": "LORA", "rank": 1, "target_modules": ["q_proj"], "size_bytes": 1038, "base_model": "tiny"}',1.79531952832643890375e+09);
INSERT INTO "blobs" VALUES('sha256:b7fa8cf490323dce54a5c9119b3b58ef4c3f879b21f6c2d69caa83e729d00728','{"peft_type": "LORA", "rank": 1, "target_modules": ["q_proj"], "size_bytes": 1038, "base_model": "tiny"}',1.79531952833394455905e+09);
CREATE TABLE names (
	name VARCHAR NOT NULL, 
	current_version INTEGER, 
	last_version INTEGER NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "names" VALUES('a',2,2);
INSERT INTO "names" VALUES('gone',NULL,1);
CREATE TABLE versions (
	name VARCHAR NOT NULL, 
	version INTEGER NOT NULL, 
	digest VARCHAR NOT NULL, 
	created_at FLOAT NOT NULL, 
	base_fingerprint VARCHAR DEFAULT '' NOT NULL, 
	deleted_at FLOAT, 
	PRIMARY KEY (name, version), 
	FOREIGN KEY(name) REFERENCES names (name), 
	FOREIGN KEY(digest) REFERENCES blobs (digest)
);
INSERT INTO "versions" VALUES('a',1,'sha256:46b2683fc861976985e057d1fc62a9b4109fa2eba46ca21917b0adabd6b7a2a3',1.79531952832643890375e+09,'sha256:base',NULL);
INSERT INTO "versions" VALUES('a',2,'sha256:b7fa8cf490323dce54a5c9119b3b58ef4c3f879b21f6c2d69caa83e729d00728',1.79531952833394455905e+09,'sha256:base',NULL);
INSERT INTO "versions" VALUES('gone',1,'sha256:46b2683fc861976985e057d1fc62a9b4109fa2eba46ca21917b0adabd6b7a2a3',1.79531952834301805491e+09,'',1.79531952834301805491e+09);
CREATE INDEX ix_versions_digest ON versions (digest);
CREATE TABLE aliases (
	alias VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	version INTEGER NOT NULL, 
	updated_at FLOAT NOT NULL, 
	PRIMARY KEY (alias), 
	FOREIGN KEY(name, version) REFERENCES versions (name, version)
);
INSERT INTO "aliases" VALUES('prod','a',1,1.79531952834301805491e+09);
CREATE INDEX ix_aliases_target ON aliases (name, version);
CREATE TABLE labels (
	name VARCHAR NOT NULL, 
	version INTEGER NOT NULL, 
	"key" VARCHAR NOT NULL, 
	value VARCHAR NOT NULL, 
	PRIMARY KEY (name, version, "key"), 
	FOREIGN KEY(name, version) REFERENCES versions (name, version)
);
INSERT INTO "labels" VALUES('a',2,'team','ops');
CREATE INDEX ix_labels_key_value ON labels ("key", value);
COMMIT;
PRAGMA user_version = 2;
